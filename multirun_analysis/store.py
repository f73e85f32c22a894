"""Read runs from an MLflow store. Nothing is dropped without a sentence that says so."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import tempfile
from collections.abc import Callable, Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from multirun_analysis.folders import json_file
from multirun_analysis.notes import run_notes
from multirun_analysis.plans import GRID_ROLE, grid_runs
from multirun_analysis.runs import (
    MEASURE,
    History,
    Json,
    ReportError,
    Run,
    Selection,
    started_s,
)
from multirun_analysis.sweeps import SWEEP_ROLE, reused_ids, untracked_jobs
from zinfer.config import TrackingConfig
from zinfer.job.files import ENVIRONMENT_FILE
from zinfer.redact import redact
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.names import MODEL_NUMBERS, NOT_PARAMETERS, NUMBERS_TAG
from zinfer.tracking.store import (
    TrackingUnavailable,
    advised,
    database_revision,
    ensure_store,
)
from zinfer.tracking.uri import sqlite_path, tracking_uri
from zinfer.units import counted

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAGE = 1000
"""Runs per request; MLflow allows 50,000, a server may allow fewer."""
IDS_PER_REQUEST = 100
LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `mlflow server` answers by default; links of a sqlite store lead there."""
NEWEST_FIRST = ["attributes.start_time DESC"]
Found = Any
"""A run as MLflow's client returns it."""


def read_mlflow(
    uri: str, *, experiment: str | None = None, run_id: str | None = None, where: str | None = None
) -> Selection:
    """Read the runs of an experiment, of a sweep, that a filter matches, or of the newest sweep.

    Args:
        run_id: of a sweep's parent run, or of a single run.
        where: an MLflow filter: "params.`offload.device` = 'nvme' and metrics.load_s > 1".

    Raises:
        ReportError: no store, nothing in it, or a filter that MLflow does not take.
    """
    with opened_store(uri) as store:
        return store.select(experiment=experiment, run_id=run_id, where=where)


def store_uri(given: str | None) -> str:
    """Name the store absolutely: the one given, MLFLOW_TRACKING_URI's, else ./mlflow.db.

    Raises:
        ReportError: a path without a scheme.
    """
    if given is not None and "://" not in given and not given.startswith("sqlite:"):
        raise ReportError(
            f"--uri {given} is no URI of a run store. Set --uri sqlite:///{given} or --uri "
            "http://127.0.0.1:5000"
        )
    return tracking_uri(TrackingConfig(store="auto", uri=given), Path.cwd())


@contextlib.contextmanager
def opened_store(uri: str) -> Iterator[MlflowStore]:
    """Connect, and turn every error into a ReportError that names this command's options."""
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise ReportError(
            f"there is no run store at {path}. Set --uri sqlite:////path/to/mlflow.db, or "
            f"--from-dir outputs. {MEASURE}"
        )
    if path is not None and _revision(path) is None:
        raise ReportError(
            f"{path} is not a run store of MLflow. Set --uri sqlite:////path/to/mlflow.db"
        )
    try:
        ensure_store(uri)
        with store_errors(uri):
            yield MlflowStore(connect(uri), uri)
    except ReportError:
        raise
    except TrackingUnavailable as error:
        settings = (f"--uri {error.other_store}",) if error.other_store else ()
        raise ReportError(advised(error.problem, error.remedy, settings)) from error


def _revision(path: Path) -> str | None:
    try:
        return database_revision(path)
    except (sqlite3.Error, OSError):
        return None


class MlflowStore:
    """The queries that a report makes."""

    def __init__(self, client: MlflowClient, uri: str) -> None:
        self.client, self.uri = client, uri
        self._experiments = {
            item.experiment_id: item.name for item in self._pages(client.search_experiments)
        }

    def select(self, *, experiment: str | None, run_id: str | None, where: str | None) -> Selection:
        """Choose and read."""
        ids = self._experiment_ids(experiment)
        if run_id is not None:
            title, found = self._family(run_id, where)
        elif experiment is not None or where is not None:
            title = f"experiment {experiment}" if experiment is not None else f"runs where {where}"
            found = self._search(ids, where)
        else:
            title, found = self._newest(ids)
        return self._selection(title, found, whole=where is None)

    def with_commit(self, commit: str) -> Selection:
        """Read all runs of a commit, given by seven or more of its first digits.

        Raises:
            ReportError: no run of it.
        """
        found = self._search(list(self._experiments), f"tags.`zinfer.commit` LIKE '{commit}%'")
        return self._selection(f"commit {commit[:7]}", found, whole=False)

    def has_experiment(self, name: str) -> bool:
        """Tell if an active experiment has this name."""
        return name in self._experiments.values()

    def has_run(self, run_id: str) -> bool:
        """Tell if a run has this id."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException:
            return False
        return True

    def _experiment_ids(self, name: str | None) -> list[str]:
        if name is None:
            return list(self._experiments)
        ids = [key for key, known in self._experiments.items() if known == name]
        if not ids:
            known_names = ", ".join(sorted(self._experiments.values())) or "none"
            raise ReportError(
                f"there is no experiment {name} in {redact(self.uri)}. Its experiments: "
                f"{known_names}"
            )
        return ids

    def _newest(self, ids: list[str]) -> tuple[str, list[Found]]:
        """Return the newest sweep or grid of plans; else the newest run's experiment."""
        for wanted in (
            f"tags.`zinfer.role` = '{SWEEP_ROLE}'",
            f"tags.`zinfer.role` = '{GRID_ROLE}'",
            "tags.`zinfer.method_version` != ''",
        ):
            newest = self.client.search_runs(ids, wanted, max_results=1, order_by=NEWEST_FIRST)
            if newest and wanted.endswith("''"):
                experiment_id = newest[0].info.experiment_id
                title = f"experiment {self._experiments[experiment_id]} (no sweep yet)"
                return title, self._search([experiment_id], None)
            if newest:
                return self._family(newest[0].info.run_id, None)
        raise ReportError(f"no run of zinfer is in {redact(self.uri)} yet. {MEASURE}")

    def _family(self, run_id: str, where: str | None) -> tuple[str, list[Found]]:
        """Return a sweep's parent with all its jobs, reused ones too; a run without jobs alone."""
        from mlflow.exceptions import MlflowException

        try:
            parent = self.client.get_run(run_id)
        except MlflowException:
            raise ReportError(
                f"there is no run {run_id} in {redact(self.uri)}. Set --run to the id of a sweep's "
                "parent run, or --experiment NAME"
            ) from None
        child = f"tags.`mlflow.parentRunId` = '{run_id}'"
        jobs = self._search([parent.info.experiment_id], " and ".join(filter(None, [child, where])))
        if _role(parent) == SWEEP_ROLE:
            here = {job.info.run_id for job in jobs}
            jobs += self._by_id(sorted(reused_ids(parent.data.tags) - here), where)
        name = parent.info.run_name or run_id
        if jobs or _role(parent) == SWEEP_ROLE:
            return f"sweep {name}", [parent, *jobs]
        return f"run {name}", [parent]

    def _by_id(self, run_ids: list[str], where: str | None) -> list[Found]:
        """Return runs by their ids, from whatever experiment; ids that are gone are left out."""
        found = []
        for start in range(0, len(run_ids), IDS_PER_REQUEST):
            quoted = ", ".join(f"'{one}'" for one in run_ids[start : start + IDS_PER_REQUEST])
            wanted = " and ".join(filter(None, [f"attributes.run_id IN ({quoted})", where]))
            found += self._search(list(self._experiments), wanted)
        return found

    def _search(self, ids: list[str], where: str | None) -> list[Found]:
        from mlflow.exceptions import MlflowException

        try:
            return list(
                self._pages(
                    lambda page_token: self.client.search_runs(
                        ids, where or "", max_results=PAGE, page_token=page_token
                    )
                )
            )
        except MlflowException as error:
            if where is None or error.error_code != "INVALID_PARAMETER_VALUE":
                raise
            said = str(error).strip().splitlines()[0]
            raise ReportError(
                f"MLflow does not take this filter: {where}. {said}. An example: --filter "
                "\"params.`offload.device` = 'nvme'\""
            ) from None

    def _pages(self, request: Callable[..., Any]) -> Iterator[Any]:
        token = None
        while True:
            page = request(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _selection(self, title: str, found: list[Found], *, whole: bool) -> Selection:
        """Sort runs into ours and others'. `whole`: no filter, so untracked jobs belong too."""
        parents = [item for item in found if _role(item) == SWEEP_ROLE]
        grids = [item for item in found if _role(item) == GRID_ROLE]
        single = [item for item in found if _role(item) not in (SWEEP_ROLE, GRID_ROLE)]
        foreign = [item for item in single if not _is_ours(item)]
        only = parents[0].info.run_id if len(parents) == 1 and found[0] is parents[0] else None
        runs = [self._run(item, only) for item in single if _is_ours(item)]
        known = {run.run_id for run in runs}
        untracked = [job for item in parents for job in untracked_jobs(item.data.tags, known)]
        plans = [run for item in grids for run in grid_runs(self._run(item, None), self._artifact)]
        notes = [*_foreign_notes(foreign), *_grid_notes(grids, plans)]
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
            experiment=self._experiments.get(info.experiment_id, info.experiment_id),
            started=started,
            status=status,
            reason=tags.get("zinfer.reason"),
            params=params,
            metrics={**sizes, **numbers_of(tags), **found.data.metrics},
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


def _role(found: Found) -> str:
    return str(found.data.tags.get("zinfer.role", ""))


def _is_ours(found: Found) -> bool:
    tags = found.data.tags
    return "zinfer.method_version" in tags or "zinfer.status" in tags


def _foreign_notes(foreign: list[Found]) -> list[str]:
    if not foreign:
        return []
    names = ", ".join(sorted(item.info.run_name or item.info.run_id for item in foreign)[:5])
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    return [
        f"{counted(len(foreign), 'run')} of another tool in the same place left out (no "
        f"zinfer.status tag): {names}{more}."
    ]


def _grid_notes(grids: list[Found], plans: list[Run]) -> list[str]:
    """Say which grids have only their table, because their points were not stored one by one."""
    read = {run.tags.get("zinfer.grid") for run in plans}
    unread = [item for item in grids if item.info.run_id not in read]
    if not unread:
        return []
    return [
        f"{counted(len(unread), 'grid')} of plans left out, nothing was measured: each has its "
        "table as an artifact, plans.csv."
    ]
