"""Make many plans in this one process: `zinfer -m task=plan ...`.

They become a table on the terminal, a CSV file, and a run in MLflow. Planning needs no torch: a
model that was never counted is counted once, in a process of its own.
"""

from __future__ import annotations

import csv
import json
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from zinfer.config import ConfigError, RunConfig
from zinfer.driver.tables import new_table
from zinfer.driver.terminal import Terminal
from zinfer.job.files import PLANS_FILE, PLANS_JSON_FILE
from zinfer.job.folder import write_json
from zinfer.machine.hardware import Hardware, detect_hardware
from zinfer.model.spec import is_counted
from zinfer.plan.binding import binding_words
from zinfer.plan.fit import largest_fitting_batch, shortfall
from zinfer.plan.planned import plan_run
from zinfer.sweep.compose import is_basic_sweeper, setting, sweep_folder, typed_overrides
from zinfer.sweep.folders import make_folders
from zinfer.sweep.grid_points import GridPoint, composed_points
from zinfer.sweep.launchers import BASIC_LAUNCHER
from zinfer.sweep.plan import plan_jobs
from zinfer.units import counted, format_bytes, format_seconds

ROWS_SHOWN = 60
POINTS_BETWEEN = 50
"""Points between two looks at the clock, to draw how far it is."""
Row = dict[str, Any]


def is_plan_grid(master: DictConfig) -> bool:
    """Return whether this sweep only plans, in this process.

    That is task=plan with Hydra's own sweeper and launcher.
    """
    own = is_basic_sweeper(master) and master.hydra.launcher._target_ == BASIC_LAUNCHER
    return own and "task=plan" in typed_overrides(master)


def plan_grid(master: DictConfig) -> int:
    """Plan every point, show and log the grid, and return the exit code.

    It is 2 where a point has no valid configuration. The other points are planned all the same.

    Raises:
        ConfigError: the points cannot be composed, or the sweep's folder cannot be made.
    """
    started_s = time.perf_counter()
    folder = sweep_folder(master)
    terminal = Terminal(str(setting(master, "format", "text")))
    terminal.note("composing the points of this grid")
    points = list(composed_points(master, folder))
    make_folders(folder)
    configs = [point.config for point in points if point.config is not None]
    output_format = configs[0].format if configs else str(OmegaConf.select(master, "format"))
    terminal.note(f"planning {counted(len(points), 'point')}")
    uncountable = count_models(configs, terminal)
    rows = list(planned_rows(points, uncountable, terminal))
    table = folder / PLANS_FILE
    write_csv(table, rows)
    write_json(folder / PLANS_JSON_FILE, {"plans": list(map(plan_document, points, rows))})
    if output_format == "json":
        print(json.dumps({"status": "planned", "plans": rows, "csv": str(table)}))
    else:
        show(rows, list(points[0].names), terminal)
    took = format_seconds(time.perf_counter() - started_s)
    terminal.note(f"{counted(len(rows), 'plan')} in {took}: {table}")
    if configs:
        log_grid(configs[0], folder, rows, terminal)
    return 2 if any(row["status"] == "refused" for row in rows) else 0


def planned_rows(
    points: Sequence[GridPoint], uncountable: dict[str, str], terminal: Terminal
) -> Iterator[Row]:
    """Yield the line of each point, and show how far it is."""
    hardware = HardwareOnce()
    terminal.phase("plan")
    for done, point in enumerate(points):
        if done % POINTS_BETWEEN == 0:
            terminal.share(done, len(points), "points")
        yield {**point.names, **point_row(point, hardware, uncountable)}
    terminal.close()


class HardwareOnce:
    """Look at each machine or box once."""

    def __init__(self) -> None:
        self._known: dict[str, Hardware] = {}

    def of(self, config: RunConfig) -> Hardware:
        """Return the hardware of this point."""
        path = config.offload.nvme_folder
        key = f"{config.hardware} {path} {config.launcher.ranks} {config.launcher.omp_threads}"
        if key not in self._known:
            self._known[key] = detect_hardware(
                config.hardware, path, config.launcher.ranks, config.launcher.omp_threads
            )
        return self._known[key]


def count_models(configs: list[RunConfig], terminal: Terminal) -> dict[str, str]:
    """Fill the cache of counted models, so that planning needs no torch here.

    Returns why a model could not be counted, where that ended or stopped the other process.
    """
    uncounted = {str(config.model): config for config in configs if not is_counted(config.model)}
    plans = plan_jobs(list(uncounted.values()), terminal)
    return {
        model: str(plan.reason)
        for model, plan in zip(uncounted, plans, strict=True)
        if plan.verdict == "unknown"
    }


def point_row(point: GridPoint, hardware: HardwareOnce, uncountable: dict[str, str]) -> Row:
    """Return one line of the table, in bytes and seconds; unknown is empty.

    A point that cannot be planned is refused alone.
    """
    if point.config is None:
        return {"status": "refused", "reason": "; ".join(point.problems)}
    if reason := uncountable.get(str(point.config.model)):
        return {"status": "refused", "reason": reason}
    try:
        return planned_row(point.config, hardware.of(point.config))
    except (ConfigError, ValueError) as error:
        return {"status": "refused", "reason": " ".join(str(error).splitlines())}
    except Exception as error:  # transformers and the checkpoint's own code raise anything
        return {"status": "refused", "reason": f"{type(error).__name__}: {error}"}


def planned_row(config: RunConfig, hardware: Hardware) -> Row:
    """Plan one point."""
    from zinfer.plan.resolved import resolved_spec

    spec = resolved_spec(config, hardware, lambda _: None)
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


def plan_document(point: GridPoint, row: Row) -> Row:
    """Return a point as a run logs itself: its choices as params, its numbers as metrics."""
    from zinfer.tracking.run import run_params

    metrics = {
        f"plan_{name}" if name.endswith(("_needed_bytes", "_available_bytes")) else name: value
        for name, value in row.items()
        if name not in point.names and type(value) in (int, float)
    }
    if "fits" in row:
        metrics["plan_fits"] = int(row["fits"])
    return {
        "status": row["status"],
        "reason": row.get("reason"),
        "params": dict(point.names) if point.config is None else run_params(point.config),
        "metrics": metrics,
        "dtype": row.get("dtype"),
        "binding_resource": row.get("binding_resource"),
    }


def write_csv(path: Path, rows: list[Row]) -> None:
    """Write the rows, with every column that any of them has."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)


def show(rows: list[Row], swept: list[str], terminal: Terminal) -> None:
    """Show the table; of a large grid the fastest points that fit."""
    order = rows
    title = counted(len(rows), "plan")
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
            binding_words(row["binding_resource"]),
            str(row["largest_batch_size"] or "none"),
        )
    terminal.table(table)


def _rate(row: Row) -> float | None:
    rate = row.get("predicted_generated_tokens_per_s", row.get("ceiling_generated_tokens_per_s"))
    return None if rate is None else float(rate)


def log_grid(config: RunConfig, folder: Path, rows: list[Row], terminal: Terminal) -> None:
    """Log the whole grid as one run: its table as an artifact, its size as metrics."""
    if config.tracking.store == "none":
        return
    from zinfer.machine.environment import environment
    from zinfer.tracking.client import connect, experiment, store_errors
    from zinfer.tracking.deadline import within
    from zinfer.tracking.names import KEY_TAG
    from zinfer.tracking.run import run_tags
    from zinfer.tracking.store import TrackingUnavailable, ensure_store
    from zinfer.tracking.uri import artifact_location, tracking_uri

    def log() -> None:
        uri = tracking_uri(config.tracking, Path.cwd())
        ensure_store(uri)
        with store_errors(uri):
            client = connect(uri, config.tracking.timeout_s)
            experiment_id = experiment(
                client, config.tracking.experiment, artifact_location(uri, Path.cwd())
            )
            tags = {
                **run_tags(config, folder, environment(config, None)),
                "mlflow.runName": f"plan of {len(rows)} points",
                "zinfer.role": "plan_grid",
                "zinfer.status": "planned",
            }
            del tags[KEY_TAG]  # the grid is nothing that a job could reuse
            run_id = client.create_run(experiment_id, tags=tags).info.run_id
            client.log_param(run_id, "command", " ".join(sys.argv[1:])[:5999])
            client.log_metric(run_id, "plans", len(rows))
            client.log_metric(run_id, "plans_that_fit", sum(bool(row.get("fits")) for row in rows))
            for name in (PLANS_FILE, PLANS_JSON_FILE):
                client.log_artifact(run_id, str(folder / name))
            client.set_terminated(run_id, "FINISHED")

    try:
        within(config.tracking.timeout_s, log, "the store")
    except TrackingUnavailable as error:
        terminal.warning(f"not logged to MLflow: {error}. The table is in {folder / PLANS_FILE}")
