"""The parent run of a sweep in MLflow: one run that holds all jobs together.

Hydra calls this before the first job and must not wait for MLflow (3 s). So the callback only
writes down, in SWEEP_DIR/parent_run.json, what the parent is, and passes that path to the jobs in
ZINFER_PARENT_RUN_ID. The first job that opens its own run, in whatever process, creates the parent
under a lock and adds its id. A sweep in which no job got that far leaves no parent.
"""

from __future__ import annotations

import atexit
import fcntl
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from hydra.experimental.callback import Callback
from pydantic.dataclasses import dataclass as checked

from zinfer.job.files import PARENT_FILE, SWEEP_FILE
from zinfer.job.outcome import Json, Status
from zinfer.job.records import STRICT, read_record, write_json
from zinfer.redact import redact
from zinfer.tracking import names
from zinfer.tracking.deadline import never, within
from zinfer.tracking.names import run_status
from zinfer.tracking.pages import comparison_page

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from omegaconf import DictConfig

PARENT_VARIABLE = "ZINFER_PARENT_RUN_ID"
"""A run's id, or the path of a parent_run.json."""
JOBS_TAG = "zinfer.jobs"
"""On the sweep's run: its jobs, as zinfer/sweep/record.py describes them."""
TAG_CHARACTERS = 7999
"""MLflow's limit; it cuts longer values without a word."""


SweptState = Literal["run", "reused", "refused", "not_run"]


@dataclass(frozen=True, kw_only=True)
class SweptRun:
    """One job of a sweep, as the sweep's run names it."""

    num: int
    run_id: str | None
    """None for a job without a run in MLflow."""
    state: SweptState


CLOSE_S = 30.0
"""Longest time that the end of a sweep waits for the store."""


@checked(frozen=True, kw_only=True, config=STRICT)
class Announced:
    """parent_run.json: what the parent run is called, and its id when a job has created it."""

    tags: dict[str, str]
    run_id: str | None


class Known:
    """The parents that this process announced or created, by file, should the file be gone."""

    parents: ClassVar[dict[Path, Announced]] = {}


class ParentRunCallback(Callback):
    """Hydra callback (hydra.callbacks.parent_run). Checks nothing: Hydra hides exceptions here."""

    def __init__(self) -> None:
        self._file: Path | None = None
        self._uri: str | None = None

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Announce the parent to the jobs, unless the sweep is part of another or logs nothing."""
        if PARENT_VARIABLE in os.environ or config.tracking.store == "none":
            return
        self.announce(
            Path(str(config.hydra.sweep.dir)).absolute(),
            list(config.hydra.overrides.task),
            config.tracking.uri,
        )

    def announce(self, sweep_dir: Path, overrides: list[str], uri: str | None) -> None:
        """Write the parent down for the jobs; whatever ends this process closes it."""
        if PARENT_VARIABLE in os.environ:
            return
        self._uri = uri
        self._file = announce_parent(sweep_dir, overrides)
        os.environ[PARENT_VARIABLE] = str(self._file)
        atexit.register(self._end_unfinished, os.getpid())

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Close the parent: every job ended well, or Hydra would not come here."""
        self.end("ok")

    def _end_unfinished(self, pid: int) -> None:
        """Close the parent at the end of the process, where on_multirun_end did not.

        Hydra does not call it when a job failed, or the sweep was interrupted.
        """
        if os.getpid() == pid:
            self.end("error")

    def end(
        self,
        status: Status,
        runs: Sequence[SweptRun] = (),
        record: Json | None = None,
        give_up: Callable[[], bool] = never,
        experiment: str | None = None,
    ) -> str | None:
        """Close the parent, once, with the runs of its jobs. Returns how to compare them.

        Args:
            experiment: where to create the parent if no job has; None leaves it out.
        """
        if self._file is None:
            return None
        file, self._file = self._file, None
        if os.environ.get(PARENT_VARIABLE) == str(file):
            del os.environ[PARENT_VARIABLE]
        return close_parent(file, self._uri, status, runs, record, give_up, experiment)


def announce_parent(sweep_dir: Path, overrides: list[str]) -> Path:
    """Write what the parent run will be called, and return the file that will hold its id."""
    name = redact(" ".join(overrides)) or "sweep"
    tags = {
        names.RUN_NAME_TAG: name[:250],
        names.SOURCE_NAME_TAG: "zinfer",
        names.SOURCE_TYPE_TAG: "LOCAL",
        names.ROLE_TAG: "sweep",
        names.STATUS_TAG: "running",
        names.SWEEP_DIR_TAG: str(sweep_dir),
        names.OVERRIDES_TAG: name[:7999],
    }
    sweep_dir.mkdir(parents=True, exist_ok=True)
    file = sweep_dir / PARENT_FILE
    Known.parents[file] = Announced(tags=tags, run_id=None)
    write_json(file, vars(Known.parents[file]))
    return file


def parent_run_id(given: str | None, client: MlflowClient, experiment_id: str) -> str | None:
    """Return the id that sweep.parent_run_id stands for.

    Creates the run that a parent_run.json announces, if no job has yet. None without a parent, or
    where its file cannot be seen (a job on another host that does not share the sweep's folder).
    """
    if given is None or Path(given).name != PARENT_FILE:
        return given
    path = Path(given)
    if not path.is_file():
        known = Known.parents.get(path)
        return None if known is None else _created(path, known, client, experiment_id)
    with path.open("r+") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        announced = read_record(path, Announced)
        if announced is None:
            return None
        run_id = _created(path, announced, client, experiment_id)
        if announced.run_id is None:
            file.seek(0)
            file.truncate()
            json.dump({"tags": announced.tags, "run_id": run_id}, file, indent=1)
        return run_id


def _created(path: Path, announced: Announced, client: MlflowClient, experiment_id: str) -> str:
    """Return the id of the announced run, which is created if it is not yet."""
    run_id = announced.run_id
    if run_id is None:
        name = announced.tags.get(names.RUN_NAME_TAG)
        run = client.create_run(experiment_id, tags=announced.tags, run_name=name)
        run_id = str(run.info.run_id)
    Known.parents[path] = Announced(tags=announced.tags, run_id=run_id)
    return run_id


def created_parent(file: Path) -> str | None:
    """Return the id of the sweep's run that this parent_run.json announces; None: not created."""
    announced = read_record(file, Announced) or Known.parents.get(file)
    return announced.run_id if announced is not None else None


def jobs_tags(runs: Sequence[SweptRun]) -> dict[str, str]:
    """Return the tags zinfer.jobs, zinfer.jobs.1, ... that name the jobs of a sweep.

    Each is a JSON list of its own, within MLflow's limit for a tag.
    """
    tags: list[list[str]] = []
    for run in runs:
        entry = json.dumps(asdict(run))
        if not tags or sum(len(other) + 2 for other in tags[-1]) + len(entry) > TAG_CHARACTERS - 2:
            tags.append([])
        tags[-1].append(entry)
    return {
        JOBS_TAG + (f".{number}" if number else ""): f"[{', '.join(entries)}]"
        for number, entries in enumerate(tags)
    }


def close_parent(
    file: Path,
    uri: str | None,
    status: Status,
    runs: Sequence[SweptRun] = (),
    record: Json | None = None,
    give_up: Callable[[], bool] = never,
    experiment: str | None = None,
) -> str | None:
    """End the parent run, if a job has created it, with the runs of its jobs.

    Returns how to see them beside each other, where there are several.

    The jobs are complete without it, so a store that is gone, or does not answer, is only said.

    Args:
        runs: all jobs of the sweep, reused ones included.
        record: stored as the artifact sweep.json.
        experiment: where to create the parent if no job has; None leaves it out.
    """
    from zinfer.config import TrackingConfig
    from zinfer.tracking.client import connect, store_errors
    from zinfer.tracking.client import experiment as experiment_id_of
    from zinfer.tracking.store import TrackingUnavailable
    from zinfer.tracking.uri import artifact_location, tracking_uri

    announced = read_record(file, Announced) or Known.parents.get(file)
    if announced is None or (announced.run_id is None and experiment is None):
        return None
    compared = [run.run_id for run in runs if run.run_id is not None]
    absolute = tracking_uri(TrackingConfig(store="sqlite", uri=uri), Path.cwd())

    def close() -> str:
        with store_errors(absolute):
            client = connect(absolute)
            run_id = announced.run_id
            if run_id is None:
                location = artifact_location(absolute, Path.cwd())
                found = experiment_id_of(client, str(experiment), location)
                run_id = parent_run_id(str(file), client, found)
            client.set_tag(run_id, names.STATUS_TAG, status)
            for name, value in jobs_tags(runs).items():
                client.set_tag(run_id, name, value)
            if record is not None:
                client.log_dict(run_id, redact(record), SWEEP_FILE)
            client.set_terminated(run_id, run_status(status))
            return str(client.get_run(run_id).info.experiment_id)

    try:
        experiment_id = within(CLOSE_S, close, redact(absolute), give_up)
    except TrackingUnavailable as error:
        print(f"the sweep's run was not closed: {error}", file=sys.stderr)
        return None
    return comparison_page(absolute, experiment_id, compared) if len(compared) > 1 else None
