"""Log one job as a run in MLflow: parameters, metrics, tags and artifacts.

Parameters are what was chosen, metrics what came out, tags the circumstances, artifacts the files.
MLflow is imported inside the functions: it takes seconds, and the driver opens the run beside its
worker's own imports. Everything is logged after timing, in batches, through MlflowClient: no global
state, no output, no credentials.
"""

from __future__ import annotations

import getpass
import json
import math
import shutil
import statistics
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import zinfer
from zinfer.config import METHOD_VERSION, RunConfig, config_key, config_to_shown
from zinfer.config.engines import engine_of
from zinfer.job.files import TRACE_FILE
from zinfer.job.outcome import Json, Outcome
from zinfer.machine.environment import hardware_fingerprint
from zinfer.redact import redact
from zinfer.tracking import names
from zinfer.tracking.client import connect, experiment, store_errors
from zinfer.tracking.inputs import dataset_inputs
from zinfer.tracking.job_key import job_key
from zinfer.tracking.names import run_status
from zinfer.tracking.pages import run_page
from zinfer.tracking.parent import parent_run_id
from zinfer.tracking.store import TrackingUnavailable, ensure_store
from zinfer.tracking.uri import artifact_location, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Metric

__all__ = ["TrackedRun", "TrackingUnavailable", "ensure_store", "open_run", "tracking_uri"]

METRICS_PER_BATCH = 1000
PARAM_CHARACTERS = 5999
TAG_CHARACTERS = 7999
"""MLflow's limits; it cuts longer values without a word."""
LOG_TAIL_BYTES = 10_000_000
ARTIFACT_FILES = (
    "config.yaml", "plan.json", "deepspeed.json", "events.jsonl", "environment.json",
    "metrics.json", "samples.json", "generated.json", "generated.txt",
    "traceback.txt", "worker.log",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TrackedRun:
    """A run that is open in MLflow; with tracking=none, one that logs nothing."""

    run_id: str | None
    config: RunConfig
    job_dir: Path
    environment: Json
    uri: str | None = None
    client: MlflowClient | None = None
    page: str | None = None
    """How to see it."""

    def finish(self, outcome: Outcome, system: Sequence[Metric] = ()) -> None:
        """Log everything that the job came to, and end the run with its truthful status.

        It ends also when something cannot be logged.

        Args:
            system: samples of the machine's load.

        Raises:
            TrackingUnavailable: the store did not take it all.
        """
        if self.client is None or self.run_id is None or self.uri is None:
            return
        with store_errors(self.uri):
            try:
                log_outcome(self.client, self.run_id, outcome, system)
                self.client.set_tag(self.run_id, names.NOTE_TAG, note(self.config, outcome))
                self._name_dtype(outcome)
                with tempfile.TemporaryDirectory(prefix="zinfer-artifacts-") as folder:
                    write_artifacts(
                        Path(folder), self.config, self.job_dir, self.environment, outcome
                    )
                    self.client.log_artifacts(self.run_id, folder)
            finally:
                self.client.set_terminated(self.run_id, run_status(outcome.status))

    def _name_dtype(self, outcome: Outcome) -> None:
        """Name a run with dtype=auto after the type that the model decided."""
        assert self.client is not None
        dtype = (outcome.model or {}).get("dtype")
        if self.config.tracking.run_name is None and self.config.dtype.weights == "auto" and dtype:
            self.client.update_run(self.run_id, name=run_name(self.config, dtype))


def open_run(
    config: RunConfig, *, job_dir: Path, environment: Json, attempt: str = ""
) -> TrackedRun:
    """Create the run, and its experiment and store where they do not exist.

    It has the parameters and tags that are known before the worker starts.

    Raises:
        TrackingUnavailable: the store cannot be reached.
    """
    if config.tracking.store == "none":
        return TrackedRun(run_id=None, config=config, job_dir=job_dir, environment=environment)
    cwd = Path.cwd()
    uri = tracking_uri(config.tracking, cwd)
    ensure_store(uri)
    with store_errors(uri):
        client = connect(uri, config.tracking.timeout_s)
        experiment_id = experiment(client, config.tracking.experiment, artifact_location(uri, cwd))
        tags = run_tags(config, job_dir, environment, attempt)
        if config.sweep.parent_run_id is not None:
            tags |= parent_tag(config.sweep.parent_run_id, client, experiment_id)
        run_id: str = client.create_run(
            experiment_id, tags=tags, run_name=tags[names.RUN_NAME_TAG]
        ).info.run_id
        client.log_batch(run_id, params=_params(run_params(config)))
        if inputs := dataset_inputs(config):
            client.log_inputs(run_id, inputs)
    return TrackedRun(
        run_id=run_id,
        config=config,
        job_dir=job_dir,
        environment=environment,
        uri=uri,
        client=client,
        page=run_page(uri, experiment_id, run_id),
    )


def run_params(config: RunConfig) -> dict[str, str]:
    """Return the choices, flattened: model.name, offload.device. What was left open is absent.

    Settings that this run does not read are there too. MLflow compares runs by every parameter that
    one has and another has not, so in a sweep of dtype=bfloat16,int4 the settings of int4 alone
    would come before the dtype.
    """
    tree = config_to_shown(config)
    flat = dict(flatten(tree))
    if config.batch.prompt == "text":
        flat["batch.prompt_text"] = tree["batch"]["prompt_text"]
    return {name: _text(name, value)[:PARAM_CHARACTERS] for name, value in flat.items()}


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the choices of a configuration's tree by their full names: ('batch.batch_size', 8).

    What is None or in NOT_PARAMETERS is left out.
    """
    for key, value in tree.items():
        name = prefix + key
        if name in names.NOT_PARAMETERS or value is None:
            continue
        if isinstance(value, Mapping):
            yield from flatten(value, f"{name}.")
        else:
            yield name, value


def flat_params(tree: Mapping[str, Any]) -> dict[str, str]:
    """Return the choices of a tree that nobody has checked, as MLflow's params have them."""
    return {name: _text(name, value)[:PARAM_CHARACTERS] for name, value in flatten(tree)}


def run_tags(
    config: RunConfig, job_dir: Path, environment: Json, attempt: str = ""
) -> dict[str, str]:
    """Return the circumstances that are known before the worker starts.

    The user's tags cannot replace ours.
    """
    checkout = environment["zinfer"]
    tags = {
        **config_to_shown(config)["tracking"]["tags"],
        names.RUN_NAME_TAG: config.tracking.run_name or run_name(config),
        names.SOURCE_NAME_TAG: "zinfer",
        names.SOURCE_TYPE_TAG: "LOCAL",
        names.SOURCE_COMMIT_TAG: checkout["commit"],
        names.USER_TAG: user_name(),
        names.ROLE_TAG: "job",
        names.STATUS_TAG: "running",
        names.METHOD_TAG: METHOD_VERSION,
        names.CONFIG_KEY_TAG: config_key(config),
        names.KEY_TAG: job_key(config, environment),
        names.VERSION_TAG: zinfer.__version__,
        names.COMMIT_TAG: checkout["commit"],
        names.DIRTY_TAG: checkout["dirty"],
        names.HARDWARE_TAG: hardware_fingerprint(environment),
        names.DEVICE_TAG: device_description(environment),
        names.MODEL_TYPE_TAG: config.model.model_type,
        names.QUANTISER_TAG: config.quantiser,
        names.JOB_DIR_TAG: job_dir.absolute(),
        names.ATTEMPT_TAG: attempt or None,
    }
    return {
        redact(name): _text(name, value)[:TAG_CHARACTERS]
        for name, value in tags.items()
        if value is not None
    }


def user_name() -> str | None:
    """Return the name of this process's user, or None where the system has none for it."""
    try:
        return getpass.getuser()
    except (KeyError, OSError):
        return None


def note(config: RunConfig, outcome: Outcome) -> str:
    """Describe the run in Markdown, for its page: how it ended, its speed, its warnings."""
    speed = outcome.metrics.get(names.HEADLINE)
    lines = [f"**{outcome.status}**: " + (f"{speed:.4g} tokens/s" if speed else run_name(config))]
    if outcome.reason:
        lines.append(outcome.reason)
    lines += [f"- {warning}" for warning in outcome.warnings]
    return redact("\n\n".join(lines))[:TAG_CHARACTERS]


def parent_tag(given: str, client: MlflowClient, experiment_id: str) -> dict[str, str]:
    """Return the tag that puts this run under its sweep's run in MLflow."""
    parent = parent_run_id(given, client, experiment_id)
    return {} if parent is None else {names.PARENT_TAG: parent}


def _text(name: str, value: Any) -> str:
    """Write a value as YAML does (true, false), without secrets. Its name may say it is one."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return redact({name: text}).popitem()[1]


def run_name(config: RunConfig, dtype: str | None = None) -> str:
    """Return a name such as 'opt-125m nvme bfloat16 b4'.

    An engine without offload stands in the place of the tier: 'opt-125m resident bfloat16 b4'.
    Searched codes are named as their preset is: 'opt-125m nvme int4_searched b4'.
    """
    where = config.offload.device if engine_of(config).offloads_to else config.engine.name
    weights = dtype if dtype and config.dtype.weights == "auto" else config.dtype.weights
    if config.dtype.bits is not None and config.dtype.rounding == "searched":
        weights += "_searched"
    return f"{config.model.name} {where} {weights} b{config.batch.batch_size}"


def device_description(environment: Json) -> str:
    """Return 'NVIDIA H100 80GB HBM3 x 2', or 'AMD EPYC (avx2 only), 2 cores'."""
    names = [gpu["name"] for gpu in environment["gpus"]]
    if names:
        return names[0] + (f" x {len(names)}" if len(names) > 1 else "")
    cpu = environment["cpu"]
    sets = f" ({cpu['instruction_sets']})" if cpu["instruction_sets"] else ""
    return f"{cpu['model'] or 'CPU'}{sets}, {cpu['usable_cores']} cores"


def log_outcome(
    client: MlflowClient, run_id: str, outcome: Outcome, system: Sequence[Metric] = ()
) -> None:
    """Log status, reason and every number, in as few requests as MLflow allows."""
    from mlflow.entities import Metric, RunTag

    now_ms = int(time.time() * 1000)
    metrics = [Metric(name, value, now_ms, step) for name, value, step in outcome_metrics(outcome)]
    metrics += system
    tags = {
        names.STATUS_TAG: outcome.status,
        names.REASON_TAG: outcome.reason,
        names.ENDED_BY_TAG: outcome.ended_by.value,
        names.DTYPE_TAG: (outcome.model or {}).get("dtype"),
        names.BINDING_TAG: ((outcome.plan or {}).get("prediction") or {}).get("binding_resource"),
        names.STABILITY_TAG: (outcome.stability or {}).get("verdict"),
        names.STABILITY_REASON_TAG: "\n".join((outcome.stability or {}).get("reasons", ())) or None,
        names.QUALITY_TAG: (outcome.quality or {}).get("verdict"),
        names.QUALITY_REASON_TAG: "\n".join((outcome.quality or {}).get("reasons", ())) or None,
        names.PROFILE_TAG: profile_lines(outcome) or None,
        names.LINEAR_TAG: (outcome.linear or {}).get("kernel"),
        names.LINEAR_REASON_TAG: linear_reason(outcome),
        names.PACKED_TAG: (outcome.packed or {}).get("kernel"),
        names.PACKED_REASON_TAG: (outcome.packed or {}).get("why"),
        names.WEIGHTS_TAG: (outcome.weights or {}).get("sha256"),
        names.WARNINGS_TAG: "\n".join(outcome.warnings) or None,
    }
    known_tags = [
        RunTag(name, _text(name, value)[:TAG_CHARACTERS])
        for name, value in tags.items()
        if value is not None
    ]
    known_tags += [RunTag(*tag) for tag in number_tags(outcome_numbers(outcome)).items()]
    client.log_batch(run_id, metrics=metrics[:METRICS_PER_BATCH], tags=known_tags)
    for start in range(METRICS_PER_BATCH, len(metrics), METRICS_PER_BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + METRICS_PER_BATCH])


def linear_reason(outcome: Outcome) -> str | None:
    """Say why a kernel multiplied, and what was measured: `4096 x 4096: 1.71x`, one a line."""
    if outcome.linear is None:
        return None
    lines = [
        f"{row['out']} x {row['inputs']}: {row['torch_s'] / row['own_s']:.2f}x ({row['kernel']})"
        for row in outcome.linear["trials"]
    ]
    return "\n".join([outcome.linear["why"], *lines])


def profile_lines(outcome: Outcome) -> str:
    """Write the most expensive operations: `aten::mm 62 %, 24 calls`, one a line."""
    return "\n".join(
        f"{item['operation']} {item['share']:.0%}, {item['calls']} calls"
        for item in outcome.profile or ()
    )


def outcome_numbers(outcome: Outcome) -> dict[str, float]:
    """Return every number of the outcome by its name; unknown and infinite ones are absent."""
    model = outcome.model or {}
    values: dict[str, Any] = {name: model.get(key) for name, key in names.MODEL_NUMBERS.items()}
    if outcome.plan is not None:
        values[names.PLAN_FITS] = int(outcome.plan["fits"])
        values[names.STORED_BYTES] = outcome.plan.get("weight_stored_bytes")
        advice = outcome.plan.get("advice") or {}
        values[names.LARGEST_BATCH] = advice.get("largest_batch_size")
        for tier, plan in outcome.plan["tiers"].items():
            needed, available = (name.format(tier=tier) for name in names.TIER_NUMBERS)
            values |= {needed: plan["needed_bytes"], available: plan["available_bytes"]}
        values |= {
            name: value
            for name, value in (outcome.plan.get("prediction") or {}).items()
            if name.startswith(names.PREDICTED_METRICS)
        }
    values |= outcome.metrics
    return {
        name: value
        for name, value in values.items()
        if value is not None and math.isfinite(float(value))
    }


def outcome_metrics(outcome: Outcome) -> list[tuple[str, float, int]]:
    """Return (name, value, step) of the numbers to compare, in the order that MLflow keeps."""
    values = outcome_numbers(outcome)
    timed = [sample for sample in outcome.samples if sample["kind"] == "timed"]
    rows = [
        *((name, values[name], 0) for name in names.COMPARED_METRICS if name in values),
        *((names.REPEAT_METRIC, sample["total_s"], sample["index"]) for sample in timed),
        *(
            (names.STEP_METRIC, value, step)
            for step, value in enumerate(_medians([sample["decode_step_s"] for sample in timed]))
        ),
    ]
    return [(name, float(value), step) for name, value, step in rows]


def number_tags(numbers: Mapping[str, float]) -> dict[str, str]:
    """Return the tags zinfer.numbers, zinfer.numbers.1, ... with all numbers that are no metrics.

    Each is a JSON object of its own, within MLflow's limit for a tag.
    """
    parts: list[dict[str, float]] = []
    for name, value in numbers.items():
        if name in names.COMPARED_METRICS:
            continue
        if not parts or len(json.dumps({**parts[-1], name: value})) > TAG_CHARACTERS:
            parts.append({})
        parts[-1][name] = value
    return {
        names.NUMBERS_TAG + (f".{number}" if number else ""): json.dumps(part)
        for number, part in enumerate(parts)
    }


def _medians(repeats: Iterable[list[float]]) -> Iterator[float]:
    """Yield the median of each decode step, over the repeats that got that far."""
    repeats = list(repeats)
    for step in range(max(map(len, repeats), default=0)):
        yield statistics.median(steps[step] for steps in repeats if len(steps) > step)


def write_artifacts(
    folder: Path, config: RunConfig, job_dir: Path, environment: Json, outcome: Outcome
) -> None:
    """Write the run's files without secrets: the job folder's, else as the outcome has them."""
    import yaml

    contents: dict[str, str | None] = {
        "config.yaml": yaml.safe_dump(config_to_shown(config), sort_keys=False),
        "environment.json": _json(environment),
        "plan.json": _json(outcome.plan),
        "deepspeed.json": _json(outcome.deepspeed),
        "metrics.json": _json(outcome_numbers(outcome) or None),
        "samples.json": _json(list(outcome.samples) or None),
        "generated.json": _json(outcome.generated),
        "traceback.txt": outcome.traceback,
    }
    for name in ARTIFACT_FILES:
        text = _tail(job_dir / name) if (job_dir / name).is_file() else contents.get(name)
        if text is not None:
            (folder / name).write_text(redact(text))
    if (job_dir / TRACE_FILE).is_file():  # names of operations and times only
        shutil.copyfile(job_dir / TRACE_FILE, folder / TRACE_FILE)


def _json(value: Any) -> str | None:
    return None if value is None else json.dumps(value, indent=1)


def _tail(path: Path) -> str:
    """Return a file's text; of a log without end only the last megabytes."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - LOG_TAIL_BYTES))
        return file.read().decode(errors="replace")


def _params(params: Mapping[str, str]) -> list[Any]:
    from mlflow.entities import Param

    return [Param(name, value) for name, value in params.items()]
