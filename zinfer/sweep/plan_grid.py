"""`zinfer -m task=plan ...`: many plans in this one process, without torch; a table on the terminal, as CSV and in MLflow.

Composing a job through Hydra takes longer than planning it, so each combination of config groups is composed once and the other overrides
are set in the plain tree. A model that was never counted is counted once, in a process of its own.
"""

from __future__ import annotations

import copy
import csv
import json
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf

from zinfer.config import ConfigError, RunConfig, config_from_tree, parse_config
from zinfer.driver.terminal import Terminal, new_table
from zinfer.machine.hardware import Hardware, detect_hardware
from zinfer.model.spec import is_counted
from zinfer.plan.fit import largest_fitting_batch, shortfall
from zinfer.plan.planned import plan_run
from zinfer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override

PLANS_FILE = "plans.csv"
ROWS_SHOWN = 60
Row = dict[str, Any]


def is_plan_grid(master: DictConfig) -> bool:
    """Whether this sweep plans only, in this process: task=plan with Hydra's own sweeper and launcher."""
    overrides = [
        *master.hydra.overrides.task,
        *(f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()),
    ]
    own = str(master.hydra.sweeper._target_).endswith("BasicSweeper") and str(
        master.hydra.launcher._target_
    ).endswith("BasicLauncher")
    return own and "task=plan" in overrides


def plan_grid(master: DictConfig) -> int:
    """Plan every point. Returns the exit code: 2 when a point is no valid configuration."""
    started_s = time.perf_counter()
    folder = Path(str(master.hydra.sweep.dir)).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    points = list(composed_points(master, folder))
    configs = [config for _, config in points if isinstance(config, RunConfig)]
    first = configs[0] if configs else None
    terminal = Terminal(first.format if first else "text")
    count_models(configs, terminal)
    hardware = HardwareOnce()
    rows = [
        {
            **names,
            **(point_row(config, hardware.of(config)) if isinstance(config, RunConfig) else config),
        }
        for names, config in points
    ]
    write_csv(folder / PLANS_FILE, rows)
    if first is not None and first.format == "json":
        print(json.dumps({"status": "planned", "plans": rows, "csv": str(folder / PLANS_FILE)}))
    else:
        show(rows, list(points[0][0]) if points else [], terminal)
    terminal.note(
        f"{len(rows)} plans in {format_seconds(time.perf_counter() - started_s)}: {folder / PLANS_FILE}"
    )
    if first is not None:
        log_grid(first, folder, rows, terminal)
    return 2 if any(row["status"] == "refused" for row in rows) else 0


def composed_points(
    master: DictConfig, folder: Path
) -> Iterator[tuple[dict[str, str], RunConfig | Row]]:
    """(what was swept, the checked configuration, or why there is none) of every point in the order of a sweep."""
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.global_hydra import GlobalHydra
    from hydra.core.override_parser.overrides_parser import OverridesParser

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    given = [f"{key}={value}" for key, value in (master.hydra.sweeper.get("params") or {}).items()]
    overrides = parser.parse_overrides([*given, *master.hydra.overrides.task])
    swept = {override.get_key_element() for override in overrides if override.is_sweep_override()}
    jobs = BasicSweeper.split_arguments(overrides, None)[0]
    trees: dict[tuple[str, ...], Any] = {}
    for job in jobs:
        parsed = parser.parse_overrides(list(job))
        names = {
            part.get_key_element(): str(part.value())
            for part in parsed
            if part.get_key_element() in swept
        }
        groups = tuple(text for text, part in zip(job, parsed, strict=True) if not is_value(part))
        values = [part for part in parsed if is_value(part)]
        try:
            if groups not in trees:
                trees[groups] = composed_tree(loader, master, list(groups), folder)
            tree = copy.deepcopy(trees[groups])
            if all(put(tree, part) for part in values):
                yield names, config_from_tree(tree)
            else:
                yield names, config_from_tree(composed_tree(loader, master, list(job), folder))
        except ConfigError as error:
            yield names, {"status": "refused", "reason": "; ".join(error.problems)}


def is_value(override: Override) -> bool:
    """A plain `a.b=value`, no choice of a config file, nothing added or deleted."""
    from hydra.core.override_parser.types import OverrideType

    key = override.get_key_element()
    plain = override.type == OverrideType.CHANGE
    return plain and not override.package and "." in key and not key.startswith("hydra.")


def composed_tree(
    loader: Any, master: DictConfig, overrides: list[str], folder: Path
) -> dict[str, Any]:
    """The resolved tree of one job, checked later.

    Raises:
        ConfigError: a setting has no value.
    """
    from hydra.core.hydra_config import HydraConfig
    from omegaconf import open_dict, read_write

    composed = loader.load_sweep_config(master, overrides)
    with read_write(composed.hydra), open_dict(composed.hydra):
        composed.hydra.job.id = composed.hydra.job.num = 0
        composed.hydra.runtime.output_dir = str(folder / "0")
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        own = composed.copy()
        with read_write(own), open_dict(own):
            del own["hydra"]
        parse_config(own)
        tree = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
    finally:
        HydraConfig.instance().cfg = before
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}


def put(tree: dict[str, Any], override: Override) -> bool:
    """Set the value where the key already is; False where it is not."""
    *path, last = override.get_key_element().split(".")
    for name in path:
        tree = tree.get(name) or {}
    if last not in tree:
        return False
    value = override.value()
    tree[last] = (
        str(value) if not isinstance(value, (int, float, bool, list, dict, type(None))) else value
    )
    return True


class HardwareOnce:
    """Each machine or box is looked at once."""

    def __init__(self) -> None:
        self._known: dict[str, Hardware] = {}

    def of(self, config: RunConfig) -> Hardware:
        """For this point."""
        path = config.offload.nvme_folder
        key = f"{config.hardware} {path} {config.launcher.ranks} {config.launcher.omp_threads}"
        if key not in self._known:
            self._known[key] = detect_hardware(
                config.hardware, path, config.launcher.ranks, config.launcher.omp_threads
            )
        return self._known[key]


def count_models(configs: list[RunConfig], terminal: Terminal) -> None:
    """Fill the cache of counted models, so that planning needs no torch here."""
    from zinfer.sweep.plan import plan_jobs

    uncounted = {str(config.model): config for config in configs if not is_counted(config.model)}
    if uncounted:
        plan_jobs(list(uncounted.values()), terminal)


def point_row(config: RunConfig, hardware: Hardware) -> Row:
    """One line of the table. Bytes, seconds; unknown is empty."""
    from zinfer.plan.resolved import resolved_spec

    try:
        spec = resolved_spec(config, hardware, lambda _: None)
    except (ConfigError, ValueError) as error:
        return {"status": "refused", "reason": str(error)}
    planned = plan_run(config, hardware, spec)
    plan, prediction = planned.plan, planned.prediction
    return {
        "status": "planned",
        "fits": plan.fits,
        "reason": None if plan.fits else shortfall(planned, with_advice=False),
        "model": spec.name,
        "dtype": config.dtype.weights if config.dtype.weights != "auto" else spec.dtype,
        **{f"{tier.name}_needed_bytes": tier.needed_bytes for tier in plan.tiers},
        **{f"{tier.name}_available_bytes": tier.available_bytes for tier in plan.tiers},
        "largest_batch_size": largest_fitting_batch(planned),
        **prediction.metrics(plan),
        "binding_resource": prediction.binding_resource,
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """Every column that any row has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[Row], swept: list[str], terminal: Terminal) -> None:
    """The table for people; of a large grid the fastest that fit."""
    order = rows
    title = f"{len(rows)} plans"
    if len(rows) > ROWS_SHOWN:
        order = sorted(rows, key=lambda row: (not row.get("fits"), -(_rate(row) or 0.0)))[
            :ROWS_SHOWN
        ]
        title = f"{ROWS_SHOWN} fastest of {len(rows)} plans, those that fit first"
    table = new_table(
        title,
        *swept,
        "fits",
        "device",
        "host",
        "prefill",
        "decode step",
        "tokens/s",
        "bound by",
        "largest batch",
    )
    for row in order:
        if row["status"] == "refused":
            table.add_row(*(row.get(name, "") for name in swept), "refused", *[""] * 6, "")
            continue
        predicted = "predicted_generated_tokens_per_s" in row
        start = "predicted" if predicted else "ceiling"
        rate = _rate(row)
        table.add_row(
            *(str(row.get(name, "")) for name in swept),
            "yes" if row["fits"] else "no",
            format_bytes(row["device_needed_bytes"]),
            format_bytes(row["host_needed_bytes"]),
            format_seconds(row.get(f"{start}_prefill_s")),
            format_seconds(row.get(f"{start}_decode_step_s")),
            "-" if rate is None else f"{'' if predicted else '<= '}{rate:.4g}",
            str(row["binding_resource"] or "-"),
            str(row["largest_batch_size"] or "none"),
        )
    terminal.table(table)


def _rate(row: Row) -> float | None:
    rate = row.get("predicted_generated_tokens_per_s", row.get("ceiling_generated_tokens_per_s"))
    return None if rate is None else float(rate)


def log_grid(config: RunConfig, folder: Path, rows: list[Row], terminal: Terminal) -> None:
    """One run in MLflow for the whole grid: its table as an artifact, its size as metrics."""
    if config.tracking.store == "none":
        return
    from zinfer.tracking.client import connect, experiment, store_errors
    from zinfer.tracking.store import (
        TrackingUnavailable,
        artifact_location,
        ensure_store,
        tracking_uri,
    )

    try:
        uri = tracking_uri(config.tracking, Path.cwd())
        ensure_store(uri)
        with store_errors(uri):
            client = connect(uri)
            experiment_id = experiment(
                client, config.tracking.experiment, artifact_location(uri, Path.cwd())
            )
            tags = {
                "mlflow.runName": f"plan of {len(rows)} points",
                "zinfer.role": "plan_grid",
                "zinfer.status": "planned",
            }
            run_id = client.create_run(experiment_id, tags=tags).info.run_id
            client.log_param(run_id, "command", " ".join(sys.argv[1:])[:5999])
            client.log_metric(run_id, "plans", len(rows))
            client.log_metric(run_id, "plans_that_fit", sum(bool(row.get("fits")) for row in rows))
            client.log_artifact(run_id, str(folder / PLANS_FILE))
            client.set_terminated(run_id, "FINISHED")
    except TrackingUnavailable as error:
        terminal.warning(f"not logged to MLflow: {error}. The table is in {folder / PLANS_FILE}")
