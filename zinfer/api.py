"""The Python door: what the command does, as functions for notebooks and programs.

`import zinfer` offers these names and imports this module when the first of them is used. Nothing
here imports torch, pandas or MLflow before the function that needs it is called.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.config.command_line import with_own_key
from zinfer.job.outcome import Json, Outcome
from zinfer.model.hf import load_model_config, load_tokenizer
from zinfer.paths import conf_dir

if TYPE_CHECKING:
    from pandas import DataFrame

    from zinfer.model.spec import ModelSpec
    from zinfer.plan.planned import Planned

__all__ = [
    "ConfigError",
    "Plan",
    "Result",
    "RunConfig",
    "compose",
    "load_model_config",
    "load_runs",
    "load_tokenizer",
    "model_spec",
    "plan",
    "run",
    "sweep",
]

Result = Outcome
"""How a run ended: status, reason, metrics, samples, job_dir, run_id."""


def compose(
    *, overrides: Sequence[str] = (), config_dir: str | Path | None = None, **choices: Any
) -> RunConfig:
    """Compose and check a configuration, as the command does with the same words.

    Args:
        overrides: settings as on the command line: ["batch.batch_size=8"].
        config_dir: folder with choices of your own (`--config-dir`).
        choices: groups and top-level settings: model="opt-175b", offload="nvme", weights="dummy".
            offload="nvme" works in the folder `swap` of the working directory where
            offload.nvme_path is not given.

    Raises:
        ConfigError: with every problem, each with what to set.
    """
    import hydra
    from hydra.core.global_hydra import GlobalHydra

    words = [*(f"{name}={value}" for name, value in choices.items()), *overrides]
    words = [with_own_key(word) for word in words]
    path = "offload.nvme_path="
    if "offload=nvme" in words and not any(path in word for word in words):
        words.append(f"{path}'{Path.cwd() / 'swap'}'")
    if config_dir is not None:
        words.append(f"hydra.searchpath=[file://{Path(config_dir).expanduser().absolute()}]")
    before = GlobalHydra.instance().hydra
    GlobalHydra.instance().hydra = None  # a notebook may hold a Hydra of its own
    try:
        with hydra.initialize_config_dir(conf_dir(), version_base="1.3"):
            composed = hydra.compose("config", overrides=words)
    except Exception as error:
        from zinfer.config.hydra_errors import composition_problems

        problems = composition_problems(error, words)
        if problems is None:
            raise
        raise ConfigError(problems) from error
    finally:
        GlobalHydra.instance().hydra = before
    return parse_config(composed)


def model_spec(model: str | RunConfig) -> ModelSpec:
    """Count a model's parameters, layers and KV cache; no weights are made.

    Args:
        model: a name of the catalogue, or a configuration whose model is meant.
    """
    from zinfer.model.spec import model_spec as counted

    config = compose(model=model) if isinstance(model, str) else model
    return counted(config.model)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """One run before it starts: bytes of each tier, and the speed to expect."""

    planned: Planned
    warnings: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """True when every tier whose size is known is large enough."""
        return self.planned.fits

    @property
    def needed_bytes(self) -> dict[str, int]:
        """Tier (device, host, pinned, disk) -> bytes that the run needs there."""
        return {tier.name: tier.needed_bytes for tier in self.planned.plan.tiers}

    @property
    def available_bytes(self) -> dict[str, int | None]:
        """Tier -> bytes that the hardware has there; None: unknown."""
        return {tier.name: tier.available_bytes for tier in self.planned.plan.tiers}

    @property
    def ceiling_tokens_per_s(self) -> float | None:
        """Fastest that streamed bytes and arithmetic allow; None where no rate is known."""
        return self.planned.prediction.ceiling.generated_tokens_per_s

    @property
    def predicted_tokens_per_s(self) -> float | None:
        """Expected speed; None on a machine that is not calibrated."""
        return self.planned.prediction.generated_tokens_per_s

    @property
    def deepspeed(self) -> Json:
        """Return the DeepSpeed JSON of this run; empty for an engine without DeepSpeed."""
        return self.planned.deepspeed_json()

    def document(self) -> Json:
        """Return the plan as `zinfer task=plan format=json` prints it."""
        return self.planned.document()


def plan(config: RunConfig) -> Plan:
    """Plan a run on the hardware of its configuration; nothing is allocated.

    Raises:
        ConfigError, ValueError: the model or the hardware cannot be used, with what to set.
    """
    from zinfer.machine.hardware import detect_hardware
    from zinfer.plan.planned import plan_run
    from zinfer.plan.resolved import resolved_spec

    warnings: list[str] = []
    hardware = detect_hardware(
        config.hardware,
        config.offload.nvme_folder,
        config.launcher.ranks,
        config.launcher.omp_threads,
    )
    spec = resolved_spec(config, hardware, warnings.append)
    return Plan(planned=plan_run(config, hardware, spec), warnings=tuple(warnings))


def run(config: RunConfig, folder: str | Path | None = None) -> Result:
    """Do the configuration's task in a process of its own, as the command does.

    The result is logged where config.tracking says. It never raises for what the run did: look at
    `status` and `reason`.

    Args:
        folder: the job's folder; None: outputs/<date>/<time> in the working directory.
    """
    return _run(config, Path(folder) if folder else _new_folder("outputs"), forked=False)


def sweep(configs: Sequence[RunConfig], folder: str | Path | None = None) -> list[Result]:
    """Run configurations one after the other, under one parent run in MLflow.

    A run that fails does not end the sweep. The workers are forked from one process that holds
    their imports, so a job costs a second and not seven.

    Args:
        folder: the sweep's folder, with one folder for each job; None: multirun/<date>/<time>.
    """
    from zinfer.tracking.parent import announce_parent, close_parent

    root = Path(folder) if folder else _new_folder("multirun")
    parent = announce_parent(root.absolute(), [f"{len(configs)} runs from Python"])
    results = []
    for number, config in enumerate(configs):
        config = config.changed(sweep={"parent_run_id": str(parent)})
        results.append(_run(config, root / str(number), forked=config.launcher.fork_workers))
    stores = {config.tracking.uri for config in configs if config.tracking.store != "none"}
    for uri in stores:
        well = all(result.status in ("ok", "planned") for result in results)
        close_parent(parent, uri, "ok" if well else "error")
    return results


def load_runs(
    *,
    experiment: str = "zinfer",
    parent: str | None = None,
    where: str | None = None,
    uri: str | None = None,
) -> DataFrame:
    """Read logged jobs into a pandas DataFrame, the newest first: one row a run.

    The columns are those of a report's runs.csv: facts (run_id, name, status, started in UTC),
    choices with a dot (batch.batch_size), metrics with their unit (decode_step_s), and tags by
    plain names (device, commit, stability). Unknown numbers are NaN.

    Args:
        experiment: name of the MLflow experiment.
        parent: run id of a sweep's own run: its jobs, reused ones included, in any experiment.
        where: an MLflow filter: "params.`offload.device` = 'nvme'".
        uri: the store; None: as the command finds it from this working directory.

    Raises:
        ValueError: no store, nothing in it, or a filter that MLflow does not take.
    """
    from multirun_analysis import runs_frame
    from multirun_analysis.runs import ReportError

    chosen = None if parent is not None else experiment
    try:
        frame = runs_frame(uri, experiment=chosen, parent=parent, where=where)
    except ReportError as error:
        raise ValueError(str(error)) from error
    return frame.sort_values("started", ascending=False, kind="stable", ignore_index=True)


def _run(config: RunConfig, folder: Path, *, forked: bool) -> Result:
    """Do one task; what the command would print is in the result."""
    from zinfer.config.tasks import function_named, task_of
    from zinfer.driver.terminal import Terminal

    folder.mkdir(parents=True, exist_ok=True)
    terminal = Terminal("text", name=folder.name, out=io.StringIO(), err=io.StringIO())
    task = task_of(config)
    options = {"forked": forked} if task.loads_model else {}
    result: Result = function_named(task.command)(config, folder.absolute(), terminal, **options)
    return result


def _new_folder(root: str) -> Path:
    """Return a new folder, named as the command does: outputs/2026-01-31/23-59-59-123456."""
    return Path(root) / datetime.now().strftime("%Y-%m-%d/%H-%M-%S-%f")
