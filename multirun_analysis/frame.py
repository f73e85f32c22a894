"""All runs as one tidy table: a row for each run, a column for each choice, metric and tag."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multirun_analysis.formats import csv_text
from multirun_analysis.runs import Run, Selection

if TYPE_CHECKING:
    import pandas

FIRST = ("run_id", "name", "experiment", "started", "status", "reason", "reused")
TAGS = {
    "zinfer.device": "device",
    "zinfer.hardware": "hardware_fingerprint",
    "zinfer.commit": "commit",
    "zinfer.dirty": "dirty",
    "zinfer.version": "zinfer_version",
    "zinfer.method_version": "method_version",
    "zinfer.dtype": "dtype_used",
    "zinfer.binding_resource": "binding_resource",
    "zinfer.stability": "stability",
    "zinfer.stability_reason": "stability_reason",
    "zinfer.quality": "quality",
    "zinfer.quality_reason": "quality_reason",
    "zinfer.warnings": "warnings",
    "mlflow.parentRunId": "parent_run_id",
}
"""Tag -> name of its column."""
WORDS = {"true": True, "false": False}

Row = dict[str, Any]


def runs_frame(
    uri: str | None = None,
    *,
    experiment: str | None = None,
    parent: str | None = None,
    where: str | None = None,
) -> pandas.DataFrame:
    """Read runs into a DataFrame: one row a run, units in the names, unknown numbers NaN.

    Args:
        uri: the MLflow store; without one, MLFLOW_TRACKING_URI, else ./mlflow.db.
        experiment: all runs of this experiment.
        parent: id of a sweep's run: its jobs, reused ones included. A single run's id will do.
        where: an MLflow filter. With none of the three, the newest sweep.

    Raises:
        ReportError: no store, nothing in it, or a filter that MLflow does not take.
    """
    from multirun_analysis.store import read_mlflow, store_uri

    selection = read_mlflow(store_uri(uri), experiment=experiment, run_id=parent, where=where)
    return frame_of(selection.runs)


def frame_of(runs: Iterable[Run]) -> pandas.DataFrame:
    """Make a DataFrame of runs; pandas is imported here only, it takes a second."""
    import pandas

    rows = tidy(runs)
    frame = pandas.DataFrame(rows, columns=columns_of(rows))
    frame["started"] = pandas.to_datetime(frame["started"], utc=True)
    return frame


def tidy(runs: Iterable[Run]) -> list[Row]:
    """Return one dict a run; what a run does not have is absent."""
    return [tidy_row(run) for run in runs]


def tidy_row(run: Run) -> Row:
    """Map names to values: facts of the run, then its choices, metrics and tags.

    Choices have a dot in their names and metrics have none; `task` and `weights` are choices.
    """
    row: Row = {
        "run_id": run.run_id,
        "name": run.name,
        "experiment": run.experiment,
        "started": run.started.isoformat() if run.started else None,
        "status": run.status,
        "reason": run.reason,
        "reused": run.reused,
    }
    row |= {name: typed(value) for name, value in run.params.items() if name not in row}
    row |= {name: value for name, value in run.metrics.items() if name not in row}
    return row | {column: run.tags[tag] for tag, column in TAGS.items() if tag in run.tags}


def typed(text: str) -> bool | int | float | str:
    """Return a choice as what it was before MLflow made text of it."""
    if text in WORDS:
        return WORDS[text]
    for kind in (int, float):
        try:
            number = kind(text)
        except ValueError:
            continue
        return text if text.lower().strip("+-") in ("nan", "inf", "infinity") else number
    return text


def columns_of(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return every column that any row has: facts first, then choices, metrics and tags by name."""
    tags = set(TAGS.values())
    names = {name for row in rows for name in row} - set(FIRST)
    choices = sorted(name for name in names - tags if "." in name or name in ("task", "weights"))
    metrics = sorted(names - tags - set(choices))
    return [*FIRST, *choices, *metrics, *(name for name in TAGS.values() if name in names)]


def write_exports(selection: Selection, folder: Path) -> list[Path]:
    """Write all runs as runs.csv, runs.jsonl and runs.parquet, each with the same columns."""
    folder.mkdir(parents=True, exist_ok=True)
    rows = tidy(selection.runs)
    columns = columns_of(rows)
    (folder / "runs.csv").write_text(
        csv_text([columns, *([_blank(row.get(name)) for name in columns] for row in rows)])
    )
    (folder / "runs.jsonl").write_text(
        "".join(
            json.dumps({name: row[name] for name in columns if name in row}) + "\n" for row in rows
        )
    )
    _write_parquet(rows, columns, folder / "runs.parquet")
    return [folder / f"runs.{suffix}" for suffix in ("csv", "jsonl", "parquet")]


def _blank(value: object) -> object:
    return "" if value is None else value


def _write_parquet(rows: Sequence[Row], columns: Sequence[str], path: Path) -> None:
    """Write with pyarrow, which MLflow brings; a column of mixed types becomes text."""
    import pyarrow
    from pyarrow import parquet

    arrays = [_column([row.get(name) for row in rows]) for name in columns]
    parquet.write_table(
        pyarrow.table(
            {name: pyarrow.array(array) for name, array in zip(columns, arrays, strict=True)}
        ),
        path,
    )


def _column(values: Sequence[Any]) -> list[Any]:
    kinds = {type(value) for value in values if value is not None}
    if kinds <= {int, float}:
        return (
            [None if value is None else float(value) for value in values]
            if float in kinds
            else list(values)
        )
    if len(kinds) > 1:
        return [None if value is None else str(value) for value in values]
    return list(values)
