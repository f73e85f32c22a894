"""Translate runs as MLflow has them. None is dropped without a sentence that says so."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

from multirun_analysis.folders import json_file
from multirun_analysis.notes import run_notes
from multirun_analysis.plans import GRID_ROLE, grid_runs
from multirun_analysis.queries import Found, role_of
from multirun_analysis.runs import (
    MEASURE,
    History,
    Json,
    ReportError,
    Run,
    Selection,
    started_s,
)
from multirun_analysis.sweeps import SWEEP_ROLE, untracked_jobs
from zinfer.job.files import ENVIRONMENT_FILE
from zinfer.redact import redact
from zinfer.tracking.client import store_errors
from zinfer.tracking.names import MODEL_NUMBERS, NOT_PARAMETERS, NUMBERS_TAG
from zinfer.units import counted

if TYPE_CHECKING:
    from mlflow import MlflowClient

LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `mlflow server` answers by default; links of a sqlite store lead there."""


SYSTEM_PREFIX = "system/"
"""MLflow's own beginning of such metrics."""


@dataclass(frozen=True, kw_only=True)
class LoggedRuns:
    """Reads what the store's runs say."""

    client: MlflowClient
    uri: str
    experiments: Mapping[str, str]
    """Id -> name."""

    def selection(self, title: str, found: Sequence[Found], *, whole: bool) -> Selection:
        """Sort runs into ours and others'. `whole`: no filter, so untracked jobs belong too."""
        parents = [item for item in found if role_of(item) == SWEEP_ROLE]
        grids = [item for item in found if role_of(item) == GRID_ROLE]
        single = [item for item in found if role_of(item) not in (SWEEP_ROLE, GRID_ROLE)]
        foreign = [item for item in single if not is_ours(item)]
        only = parents[0].info.run_id if len(parents) == 1 and found[0] is parents[0] else None
        runs = [self._run(item, only) for item in single if is_ours(item)]
        known = {run.run_id for run in runs}
        untracked = [job for item in parents for job in untracked_jobs(item.data.tags, known)]
        plans = [run for item in grids for run in grid_runs(self._run(item, None), self._artifact)]
        notes = [*foreign_notes(foreign), *grid_notes(grids, plans)]
        if whole and untracked:
            notes.append(
                f"{counted(len(untracked), 'job')} of the sweep never reached MLflow (refused, or "
                "the store was away); read from the sweep's own folder."
            )
        runs += [*(untracked if whole else []), *plans]
        if not runs:
            left_out = f" {notes[0]}" if notes else ""
            raise ReportError(
                f"{title} in {redact(self.uri)} has no run of zinfer.{left_out} Set --experiment "
                f"NAME or --run ID. {MEASURE}"
            )
        return Selection(
            title=title,
            where=redact(self.uri),
            runs=tuple(sorted(runs, key=started_s)),
            notes=(*notes, *run_notes(runs)),
            parent=only if whole else None,
            history=self._history,
            environment=lambda run: self._artifact(run, ENVIRONMENT_FILE),
        )

    def _run(self, found: Found, parent: str | None) -> Run:
        """Translate; a run of another parent than the selection's is a reused one."""
        info, tags = found.info, dict(found.data.tags)
        server = self.uri if self.uri.startswith(("http://", "https://")) else LOCAL_SERVER
        status = tags.get("zinfer.status", "running" if info.status == "RUNNING" else "error")
        started = datetime.fromtimestamp(info.start_time / 1000, UTC) if info.start_time else None
        params = {key: text for key, text in found.data.params.items() if key not in NOT_PARAMETERS}
        sizes = {name: float(params.pop(name)) for name in MODEL_NUMBERS if name in params}
        page = f"{redact(server).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}"
        return Run(
            run_id=info.run_id,
            name=info.run_name or info.run_id[:8],
            experiment=self.experiments.get(info.experiment_id, info.experiment_id),
            started=started,
            status=status,
            reason=tags.get("zinfer.reason"),
            params=params,
            metrics={**sizes, **numbers_of(tags), **own_metrics(found.data.metrics)},
            tags=tags,
            url=page,
            reused=parent is not None and tags.get("mlflow.parentRunId") != parent,
        )

    def _history(self, run: Run, metric: str) -> History:
        if run.url is None or "#" in run.run_id:
            return ()  # out of a folder or a grid: the store does not know it
        with store_errors(self.uri):
            points = self.client.get_metric_history(run.run_id, metric)
            return tuple(sorted((point.step, point.value) for point in points))

    def _artifact(self, run: Run, name: str) -> Json | None:
        """Return a JSON artifact; None where it was never logged, or its store is out of reach."""
        if run.url is None:
            return None
        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        try:
            with tempfile.TemporaryDirectory(prefix="zinfer-report-") as folder:
                run_id = run.run_id.partition("#")[0]  # a point of a grid has the grid's
                return json_file(Path(self.client.download_artifacts(run_id, name, folder)))
        except (MlflowException, OSError):
            return None


def own_metrics(metrics: Mapping[str, float]) -> dict[str, float]:
    """Leave out the load of the whole machine (tracking.system_metrics): it is no result."""
    return {name: value for name, value in metrics.items() if not name.startswith(SYSTEM_PREFIX)}


def numbers_of(tags: Mapping[str, str]) -> dict[str, float]:
    """Read the numbers of a run that are no metrics, from its tags; what is no number is left out.

    Runs of earlier versions have none: all their numbers are metrics.
    """
    numbers: dict[str, float] = {}
    for name, text in tags.items():
        if name == NUMBERS_TAG or name.startswith(NUMBERS_TAG + "."):
            numbers |= _numbers_in(text)
    return numbers


def _numbers_in(text: str) -> dict[str, float]:
    try:
        found = json.loads(text)
    except ValueError:
        return {}
    if not isinstance(found, dict):
        return {}
    return {name: float(value) for name, value in found.items() if isinstance(value, int | float)}


def is_ours(found: Found) -> bool:
    """Return whether zinfer logged this run."""
    tags = found.data.tags
    return "zinfer.method_version" in tags or "zinfer.status" in tags


def foreign_notes(foreign: list[Found]) -> list[str]:
    """Say which runs of other tools are left out."""
    if not foreign:
        return []
    names = ", ".join(sorted(item.info.run_name or item.info.run_id for item in foreign)[:5])
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    return [
        f"{counted(len(foreign), 'run')} of another tool in the same place left out (no "
        f"zinfer.status tag): {names}{more}."
    ]


def grid_notes(grids: list[Found], plans: list[Run]) -> list[str]:
    """Say which grids have only their table, because their points were not stored one by one."""
    read = {run.tags.get("zinfer.grid") for run in plans}
    unread = [item for item in grids if item.info.run_id not in read]
    if not unread:
        return []
    return [
        f"{counted(len(unread), 'grid')} of plans left out, nothing was measured: each has its "
        "table as an artifact, plans.csv."
    ]
