"""Open an MLflow store, and read the runs that were asked for."""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from multirun_analysis.logged import LoggedRuns, is_ours
from multirun_analysis.progress import Progress, silent
from multirun_analysis.queries import Queries
from multirun_analysis.runs import MEASURE, ReportError, Selection
from zinfer.config import TrackingConfig
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.store import (
    TrackingUnavailable,
    advised,
    database_revision,
    ensure_store,
)
from zinfer.tracking.uri import sqlite_path, tracking_uri

if TYPE_CHECKING:
    from mlflow import MlflowClient


def read_mlflow(
    uri: str,
    *,
    experiment: str | None = None,
    run_id: str | None = None,
    where: str | None = None,
    progress: Progress = silent,
) -> Selection:
    """Read the runs of an experiment, of a sweep, that a filter matches, or of the newest sweep.

    Args:
        run_id: of a sweep's parent run, or of a single run.
        where: an MLflow filter: "params.`offload.device` = 'nvme' and metrics.load_s > 1".

    Raises:
        ReportError: no store, nothing in it, or a filter that MLflow does not take.
    """
    with opened_store(uri, progress) as store:
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
def opened_store(uri: str, progress: Progress = silent) -> Iterator[MlflowStore]:
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
            yield MlflowStore(connect(uri), uri, progress)
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
    """The runs of one store."""

    def __init__(self, client: MlflowClient, uri: str, progress: Progress = silent) -> None:
        self.client = client
        self._queries = Queries(client, uri, progress)
        self._runs = LoggedRuns(client=client, uri=uri, experiments=self._queries.experiments)

    def select(self, *, experiment: str | None, run_id: str | None, where: str | None) -> Selection:
        """Choose and read."""
        ask = self._queries
        ids = ask.experiment_ids(experiment)
        if run_id is not None:
            title, found = ask.family(run_id, where)
        elif experiment is not None or where is not None:
            title = f"experiment {experiment}" if experiment is not None else f"runs where {where}"
            found = ask.search(ids, where)
        else:
            title, found = ask.newest(ids)
        return self._runs.selection(title, found, whole=where is None)

    def with_commit(self, commit: str) -> Selection | None:
        """Read all runs of a commit, given by its first digits; None where there is none."""
        ask = self._queries
        found = ask.search(list(ask.experiments), f"tags.`zinfer.commit` LIKE '{commit}%'")
        if not any(is_ours(item) for item in found):
            return None
        return self._runs.selection(f"commit {commit[:7]}", found, whole=False)

    def newest_commits(self, most: int) -> list[str]:
        """Return the commits of the newest runs, the newest first."""
        return self._queries.newest_commits(most)

    def has_experiment(self, name: str) -> bool:
        """Tell if an active experiment has this name."""
        return name in self._queries.experiments.values()

    def has_run(self, run_id: str) -> bool:
        """Tell if a run has this id."""
        from mlflow.exceptions import MlflowException

        try:
            self.client.get_run(run_id)
        except MlflowException:
            return False
        return True
