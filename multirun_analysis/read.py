"""Runs out of an MLflow store, or out of job folders where there is no store. Nothing is dropped without a sentence that says so."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import METHOD_VERSION
from zinfer.job.files import EVENTS_FILE, JOB_FILE, RESULT_FILE
from zinfer.redact import redact
from zinfer.tracking.client import connect, store_errors
from zinfer.tracking.names import NOT_PARAMETERS
from zinfer.tracking.store import TrackingUnavailable, advised, database_revision, ensure_store
from zinfer.tracking.uri import sqlite_path

if TYPE_CHECKING:
    from mlflow import MlflowClient

PAGE = 1000
"""Runs per request; MLflow allows 50,000, a server may allow fewer."""
STATUSES = (
    "ok",
    "planned",
    "refused",
    "does_not_fit",
    "oom_device",
    "oom_host",
    "killed",
    "timeout",
    "error",
    "running",
)
"""zinfer.outcome.Status, and `running` for a run that nobody has ended."""
MEASURE = "Or measure first: zinfer -m offload=none,cpu,nvme"
LOCAL_SERVER = "http://127.0.0.1:5000"
"""Where `mlflow server` answers by default; links of a sqlite store lead there."""

Json = dict[str, Any]
History = tuple[tuple[int, float], ...]


class ReportError(TrackingUnavailable):
    """There is nothing to report, or it cannot be read. One sentence, with what to type instead; the command ends with exit code 2."""


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job as it was logged."""

    run_id: str
    name: str
    experiment: str
    started: datetime | None
    status: str
    """One of STATUSES."""
    reason: str | None
    """Why it did not end well."""
    params: Mapping[str, str]
    """Choices, flattened: model.name, offload.device, batch.batch_size."""
    metrics: Mapping[str, float]
    """Numbers by their names with unit; what is unknown is absent."""
    tags: Mapping[str, str]
    url: str | None = None
    """Of its page in MLflow."""

    @property
    def method_version(self) -> str:
        return self.tags.get("zinfer.method_version", "unknown")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs that a report is about."""

    title: str
    where: str
    """The store or folder, without credentials."""
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or looks odd."""
    history: Callable[[Run, str], History] = field(default=lambda run, metric: (), repr=False)
    """Every (step, value) of a metric: one request each, so only for the few runs of a figure."""
    environment: Callable[[Run], Json | None] = field(default=lambda run: None, repr=False)
    """environment.json of a run; None when it has none."""


# MLflow


def read_mlflow(
    uri: str, *, experiment: str | None = None, run_id: str | None = None, where: str | None = None
) -> Selection:
    """Runs of a store: of an experiment, of a sweep's parent run, that a filter matches, or (nothing given) of the newest sweep.

    Args:
        where: an MLflow filter, e.g. "params.`offload.device` = 'nvme' and metrics.generated_tokens_per_s > 1".

    Raises:
        ReportError: no store, nothing in it, or a filter that MLflow does not take.
    """
    path = sqlite_path(uri)
    if path is not None and not path.is_file():
        raise ReportError(
            f"there is no run store at {path}. Type --uri sqlite:////path/to/mlflow.db, or --from-dir outputs. {MEASURE}"
        )
    if path is not None and _revision(path) is None:
        raise ReportError(
            f"{path} is not a run store of MLflow. Type --uri sqlite:////path/to/mlflow.db"
        )
    try:
        ensure_store(uri)
        with store_errors(uri):
            client = connect(uri)
            return MlflowStore(client, uri).select(
                experiment=experiment, run_id=run_id, where=where
            )
    except ReportError:
        raise
    except TrackingUnavailable as error:
        settings = (f"--uri {error.other_store}",) if error.other_store else ()
        raise ReportError(advised(error.problem, error.remedy, settings)) from error


def _revision(path: Path) -> str | None:
    import sqlite3

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
            title, found = self._newest_sweep(ids)
        return self._selection(title, found, whole=where is None)

    def _experiment_ids(self, name: str | None) -> list[str]:
        if name is None:
            return list(self._experiments)
        ids = [key for key, known in self._experiments.items() if known == name]
        if not ids:
            known_names = ", ".join(sorted(self._experiments.values())) or "none"
            raise ReportError(
                f"there is no experiment {name} in {redact(self.uri)}. Its experiments: {known_names}"
            )
        return ids

    def _newest_sweep(self, ids: list[str]) -> tuple[str, list[Any]]:
        sweeps = self.client.search_runs(
            ids,
            "tags.`zinfer.role` = 'sweep'",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if sweeps:
            return self._family(sweeps[0].info.run_id, None)
        newest = self.client.search_runs(
            ids,
            "tags.`zinfer.method_version` != ''",
            max_results=1,
            order_by=["attributes.start_time DESC"],
        )
        if not newest:
            raise ReportError(f"no run of zinfer is in {redact(self.uri)} yet. {MEASURE}")
        experiment_id = newest[0].info.experiment_id
        return f"experiment {self._experiments[experiment_id]} (no sweep yet)", self._search(
            [experiment_id], None
        )

    def _family(self, run_id: str, where: str | None) -> tuple[str, list[Any]]:
        """A sweep's parent and its children; a run without children alone."""
        from mlflow.exceptions import MlflowException

        try:
            parent = self.client.get_run(run_id)
        except MlflowException:
            raise ReportError(
                f"there is no run {run_id} in {redact(self.uri)}. Type --run with the id of a sweep's parent run, or --experiment NAME"
            ) from None
        children = self._search(
            [parent.info.experiment_id],
            " and ".join(filter(None, [f"tags.`mlflow.parentRunId` = '{run_id}'", where])),
        )
        name = parent.info.run_name or run_id
        return (
            (f"sweep {name}", [parent, *children])
            if children or _role(parent) == "sweep"
            else (f"run {name}", [parent])
        )

    def _search(self, ids: list[str], where: str | None) -> list[Any]:
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
                f"MLflow does not take this filter: {where}. {said}. An example: --filter \"params.`offload.device` = 'nvme'\""
            ) from None

    def _pages(self, request: Callable[..., Any]) -> Iterator[Any]:
        token = None
        while True:
            page = request(page_token=token)
            yield from page
            token = page.token
            if not token:
                return

    def _selection(self, title: str, found: list[Any], *, whole: bool) -> Selection:
        """`whole`: no filter was given, so the jobs that never reached the store belong to it too."""
        parents = [item for item in found if _role(item) == "sweep"]
        grids = [item for item in found if _role(item) == "plan_grid"]
        single = [item for item in found if _role(item) not in ("sweep", "plan_grid")]
        foreign = [item for item in single if not _is_ours(item)]
        runs = [self._run(item) for item in single if _is_ours(item)]
        untracked = list(_untracked_jobs(parents, {run.run_id for run in runs})) if whole else []
        notes = [*_foreign_notes(foreign), *_grid_notes(grids), *_untracked_notes(untracked)]
        runs += untracked
        if not runs:
            left_out = f" {notes[0]}" if notes else ""
            raise ReportError(
                f"{title} in {redact(self.uri)} has no run of zinfer.{left_out} Type --experiment NAME or --run ID. {MEASURE}"
            )
        return Selection(
            title=title,
            where=redact(self.uri),
            runs=tuple(sorted(runs, key=_start)),
            notes=(*notes, *_run_notes(runs)),
            history=self._history,
            environment=self._environment,
        )

    def _run(self, found: Any) -> Run:
        info, tags = found.info, dict(found.data.tags)
        server = self.uri if self.uri.startswith(("http://", "https://")) else LOCAL_SERVER
        status = tags.get("zinfer.status", "running" if info.status == "RUNNING" else "error")
        return Run(
            run_id=info.run_id,
            name=info.run_name or info.run_id[:8],
            experiment=self._experiments.get(info.experiment_id, info.experiment_id),
            started=datetime.fromtimestamp(info.start_time / 1000, UTC)
            if info.start_time
            else None,
            status=status,
            reason=tags.get("zinfer.reason"),
            params=dict(found.data.params),
            metrics=dict(found.data.metrics),
            tags=tags,
            url=f"{redact(server).rstrip('/')}/#/experiments/{info.experiment_id}/runs/{info.run_id}",
        )

    def _history(self, run: Run, metric: str) -> History:
        with store_errors(self.uri):
            return tuple(
                sorted(
                    (point.step, point.value)
                    for point in self.client.get_metric_history(run.run_id, metric)
                )
            )

    def _environment(self, run: Run) -> Json | None:
        import tempfile

        from mlflow.exceptions import MlflowException

        os.environ.setdefault("MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR", "false")
        try:
            with tempfile.TemporaryDirectory(prefix="zinfer-report-") as folder:
                return _json_file(
                    Path(self.client.download_artifacts(run.run_id, "environment.json", folder))
                )
        except (
            MlflowException,
            OSError,
        ):  # never logged, or its artifact store is out of reach: the report says that it is not known
            return None


def _role(found: Any) -> str:
    return str(found.data.tags.get("zinfer.role", ""))


def _is_ours(found: Any) -> bool:
    tags = found.data.tags
    return "zinfer.method_version" in tags or "zinfer.status" in tags


def _foreign_notes(foreign: list[Any]) -> list[str]:
    if not foreign:
        return []
    names = ", ".join(sorted(item.info.run_name or item.info.run_id for item in foreign)[:5])
    more = f" and {len(foreign) - 5} more" if len(foreign) > 5 else ""
    return [
        f"{_count(len(foreign), 'run')} of another tool in the same place left out (no zinfer.status tag): {names}{more}."
    ]


def _grid_notes(grids: list[Any]) -> list[str]:
    if not grids:
        return []
    return [
        f"{_count(len(grids), 'grid')} of plans left out, nothing was measured: each has its table as an artifact, plans.csv."
    ]


def _untracked_jobs(parents: list[Any], known: set[str]) -> Iterator[Run]:
    """Jobs of a sweep that were refused before MLflow was asked: they are only in the sweep's folder, where that is on this machine."""
    for parent in parents:
        folder = Path(parent.data.tags.get("zinfer.sweep_dir", "/nonexistent"))
        if folder.is_dir():
            yield from (
                run
                for run in _folder_runs(folder)
                if run.run_id not in known and run.tags.get("zinfer.tracked") != "true"
            )


def _untracked_notes(jobs: list[Run]) -> list[str]:
    if not jobs:
        return []
    return [
        f"{_count(len(jobs), 'job')} of the sweep never reached MLflow (refused, or the store was away); read from the sweep's own folder."
    ]


# Job folders


def read_folder(folder: Path) -> Selection:
    """Runs out of job folders (result.json, and job.json or .hydra/config.yaml beside it), at any depth.

    Raises:
        ReportError: no such folder, or no job in it.
    """
    if not folder.is_dir():
        raise ReportError(
            f"{folder} is not a folder. Type --from-dir outputs, or --uri for an MLflow store"
        )
    runs = tuple(sorted(_folder_runs(folder), key=_start))
    if not runs:
        raise ReportError(
            f"no job folder (with a {RESULT_FILE}) is in {folder}. Type --from-dir outputs or --from-dir multirun"
        )
    unread = [str(path.parent) for path in folder.rglob(RESULT_FILE) if _json_file(path) is None]
    notes = (
        [
            f"{_count(len(unread), 'job folder')} left out, {RESULT_FILE} cannot be read: {', '.join(unread[:5])}."
        ]
        if unread
        else []
    )
    folders = {run.run_id: Path(run.tags["zinfer.job_dir"]) for run in runs}
    return Selection(
        title=f"jobs in {folder}",
        where=str(folder),
        runs=runs,
        notes=(*notes, *_run_notes(runs)),
        history=lambda run, metric: _folder_history(folders[run.run_id], metric),
        environment=lambda run: _json_file(folders[run.run_id] / "environment.json"),
    )


def _folder_runs(folder: Path) -> Iterator[Run]:
    for path in sorted(folder.rglob(RESULT_FILE)):
        result = _json_file(path)
        if result is not None and "status" in result:
            yield _folder_run(path.parent, result)


def _folder_run(job_dir: Path, result: Json) -> Run:
    job = _json_file(job_dir / JOB_FILE) or {}
    config = job.get("config") or _hydra_config(job_dir)
    model = result.get("model") or {}
    plan = (result.get("plan") or {}).get("tiers") or {}
    environment = _json_file(job_dir / "environment.json") or {}
    metrics: dict[str, Any] = {
        "model_parameters": model.get("parameters"),
        "weight_bytes": model.get("weight_bytes"),
    }
    for tier, needs in plan.items():
        metrics |= {
            f"plan_{tier}_needed_bytes": needs.get("needed_bytes"),
            f"plan_{tier}_available_bytes": needs.get("available_bytes"),
        }
    metrics |= result.get("metrics") or {}
    tags = {
        "zinfer.status": result["status"],
        "zinfer.dtype": model.get("dtype"),
        "zinfer.commit": (environment.get("zinfer") or {}).get("commit"),
        "zinfer.method_version": result.get("method_version"),
        "zinfer.job_dir": str(job_dir),
        "zinfer.tracked": "true" if result.get("run_id") else None,
    }
    return Run(
        run_id=result.get("run_id") or str(job_dir),
        name=job_dir.name,
        experiment=str((config.get("tracking") or {}).get("experiment", "")),
        started=datetime.fromtimestamp((job_dir / RESULT_FILE).stat().st_mtime, UTC),
        status=result["status"],
        reason=result.get("reason") or "; ".join(result.get("problems") or []) or None,
        params={
            name: str(value).lower() if isinstance(value, bool) else str(value)
            for name, value in _flat(config, "")
        },
        metrics={name: float(value) for name, value in metrics.items() if value is not None},
        tags={name: str(value) for name, value in tags.items() if value is not None},
    )


def _hydra_config(job_dir: Path) -> Json:
    """What Hydra composed, for a job that was refused before it had a checked configuration."""
    import yaml

    try:
        tree = yaml.safe_load((job_dir / ".hydra" / "config.yaml").read_text())
    except (OSError, yaml.YAMLError):
        return {}
    return tree if isinstance(tree, dict) else {}


def _flat(tree: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, Any]]:
    """The names that MLflow's params have."""
    for key, value in tree.items():
        name = f"{prefix}{key}"
        if name in NOT_PARAMETERS or value is None:
            continue
        if isinstance(value, Mapping):
            yield from _flat(value, f"{name}.")
        else:
            yield name, value


def _folder_history(job_dir: Path, metric: str) -> History:
    """Medians of the decode steps over the timed generations, from the worker's events."""
    import statistics

    if metric != "decode_step_s_by_step" or not (job_dir / EVENTS_FILE).is_file():
        return ()
    lines = (job_dir / EVENTS_FILE).read_text(errors="replace").splitlines()
    samples = [
        json.loads(line) for line in lines if '"event": "sample"' in line and line.endswith("}")
    ]
    repeats = [sample["decode_step_s"] for sample in samples if sample.get("kind") == "timed"]
    return tuple(
        (step, statistics.median(values)) for step, values in enumerate(zip(*repeats, strict=False))
    )


def _json_file(path: Path) -> Json | None:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return None
    return content if isinstance(content, dict) else None


# Notes


def _run_notes(runs: Iterable[Run]) -> list[str]:
    """What a reader should know of these runs before the numbers."""
    runs = list(runs)
    notes = []
    older = [run for run in runs if run.method_version not in (str(METHOD_VERSION), "unknown")]
    if older:
        versions = ", ".join(sorted({run.method_version for run in older}))
        notes.append(
            f"{_count(len(older), 'run')} measured with method version {versions}, today's is {METHOD_VERSION}: what is timed or what "
            "a metric means has changed (CHANGELOG.md). They are shown, and never compared with the others."
        )
    unversioned = [run for run in runs if run.method_version == "unknown" and run.status == "ok"]
    if unversioned:
        notes.append(
            f"{_count(len(unversioned), 'run')} without a method version: compared only among themselves."
        )
    unmeasured = [
        run for run in runs if run.status == "ok" and "generated_tokens_per_s" not in run.metrics
    ]
    if unmeasured:
        names = ", ".join(run.name for run in unmeasured[:5])
        notes.append(
            f"{_count(len(unmeasured), 'run')} ended well but logged no generated_tokens_per_s, so no speed is shown for them: {names}."
        )
    running = [run for run in runs if run.status == "running"]
    if running:
        notes.append(
            f"{_count(len(running), 'run')} had not ended when this was written, or ended without being able to say so."
        )
    return notes


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}" if number == 1 else f"{number} {noun}s"


def _start(run: Run) -> float:
    return run.started.timestamp() if run.started else 0.0
