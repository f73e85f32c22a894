"""Which jobs of a sweep need not run again: one query of the store at the start of the sweep, whatever the number of jobs.

A run is reused when everything that decides its numbers is equal: the resolved configuration without paths, the code, the libraries, the
hardware and the method. All of it is in the run's tag zinfer.key.
"""

from __future__ import annotations

import contextlib
import sqlite3
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import quote

from zinfer.job.files import RESULT_FILE, REUSED_FILE
from zinfer.job.folder import read_json, write_json
from zinfer.job.outcome import STOPPED_FROM_OUTSIDE, EndedBy, Json, Status
from zinfer.tracking.job_key import KEY_TAG
from zinfer.tracking.store import sqlite_path

HEADLINE = "generated_tokens_per_s"


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """A run that ended, found in the store."""

    key: str
    run_id: str
    status: Status
    reason: str | None
    job_dir: str | None
    tokens_per_s: float | None
    ended_by: EndedBy = EndedBy.ITSELF

    @property
    def ended_well(self) -> bool:
        return self.status in ("ok", "planned")

    def document(self) -> Json:
        """JSON-able; EarlierRun.read reads it back."""
        return asdict(self)

    @classmethod
    def read(cls, document: Json) -> EarlierRun:
        """The run that `document` describes."""
        return cls(**{**document, "ended_by": EndedBy(document["ended_by"])})


def reusable_runs(uri: str, experiment: str, retry: str) -> dict[str, EarlierRun]:
    """Key -> the run that stands for it. `retry` says which of those that ended badly are run again.

    An unreadable store has nothing to reuse; that it is unreadable is said when the first run is logged.
    """
    found: dict[str, EarlierRun] = {}
    for run in ended_runs(uri, experiment):  # the newest last
        if run.ended_well or (
            not may_retry(run, retry) and not (run.key in found and found[run.key].ended_well)
        ):
            found[run.key] = run
        elif run.key in found and not found[run.key].ended_well:
            del found[run.key]
    return found


def may_retry(run: EarlierRun, retry: str) -> bool:
    """Whether a run that ended badly is to be run again."""
    if run.ended_by in STOPPED_FROM_OUTSIDE:
        return True
    return retry == "failed" or (retry == "oom" and run.status in ("oom_device", "oom_host"))


def ended_runs(uri: str, experiment: str) -> Iterable[EarlierRun]:
    """Every job's run of the experiment that is not running, the newest last."""
    path = sqlite_path(uri)
    if path is None:
        return list(_from_mlflow(uri, experiment))
    if not path.exists():
        return []
    try:
        return list(_from_sqlite(path, experiment))
    except sqlite3.Error:
        return []


def _from_sqlite(path: Path, experiment: str) -> Iterator[EarlierRun]:
    """Read straight from the file: importing MLflow takes seconds."""
    query = """
        SELECT key_tag.value, runs.run_uuid, status_tag.value, reason_tag.value, dir_tag.value, metric.value,
               ended_tag.value
        FROM tags AS key_tag
        JOIN runs ON runs.run_uuid = key_tag.run_uuid
        JOIN experiments ON experiments.experiment_id = runs.experiment_id
        JOIN tags AS status_tag ON status_tag.run_uuid = runs.run_uuid AND status_tag.key = 'zinfer.status'
        LEFT JOIN tags AS reason_tag ON reason_tag.run_uuid = runs.run_uuid AND reason_tag.key = 'zinfer.reason'
        LEFT JOIN tags AS dir_tag ON dir_tag.run_uuid = runs.run_uuid AND dir_tag.key = 'zinfer.job_dir'
        LEFT JOIN tags AS ended_tag ON ended_tag.run_uuid = runs.run_uuid AND ended_tag.key = 'zinfer.ended_by'
        LEFT JOIN latest_metrics AS metric ON metric.run_uuid = runs.run_uuid AND metric.key = ?
        WHERE key_tag.key = ? AND experiments.name = ? AND runs.lifecycle_stage = 'active'
          AND runs.status IN ('FINISHED', 'FAILED', 'KILLED')
        ORDER BY runs.end_time
    """
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(path))}?mode=ro", uri=True, timeout=60)
    ) as connection:
        for key, run_id, status, reason, job_dir, value, ended_by in connection.execute(
            query, (HEADLINE, KEY_TAG, experiment)
        ):
            yield EarlierRun(
                key=key,
                run_id=run_id,
                status=status,
                reason=reason,
                job_dir=job_dir,
                tokens_per_s=value,
                ended_by=EndedBy(ended_by or EndedBy.ITSELF),
            )


def _from_mlflow(uri: str, experiment: str) -> Iterator[EarlierRun]:
    """The same through MLflow, for servers and other databases."""
    from zinfer.tracking.client import connect, store_errors
    from zinfer.tracking.store import TrackingUnavailable, ensure_store

    try:
        ensure_store(uri)
        with store_errors(uri):
            client = connect(uri)
            found = client.get_experiment_by_name(experiment)
            token: Any = None
            while found is not None:
                where = "tags.`zinfer.role` = 'job' and attributes.status != 'RUNNING'"
                page = client.search_runs(
                    [found.experiment_id],
                    where,
                    max_results=1000,
                    order_by=["end_time ASC"],
                    page_token=token,
                )
                for run in page:
                    tags = run.data.tags
                    if KEY_TAG in tags:
                        yield EarlierRun(
                            key=tags[KEY_TAG],
                            run_id=run.info.run_id,
                            status=tags["zinfer.status"],
                            reason=tags.get("zinfer.reason"),
                            job_dir=tags.get("zinfer.job_dir"),
                            tokens_per_s=run.data.metrics.get(HEADLINE),
                            ended_by=EndedBy(tags.get("zinfer.ended_by", EndedBy.ITSELF)),
                        )
                token = page.token
                if not token:
                    return
    except TrackingUnavailable:
        return


def note_reused(earlier: EarlierRun, job_dir: Path) -> None:
    """Leave in the job's folder which run stands for it, with all that is known of that run."""
    job_dir.mkdir(parents=True, exist_ok=True)
    document: Json = {
        "status": earlier.status,
        "reason": earlier.reason,
        "ended_by": earlier.ended_by.value,
        "run_id": earlier.run_id,
        "job_dir": earlier.job_dir,
    }
    if earlier.tokens_per_s is not None:
        document["metrics"] = {"generated_tokens_per_s": earlier.tokens_per_s}
    if earlier.job_dir is not None:
        document |= read_json(Path(earlier.job_dir) / RESULT_FILE) or {}
    write_json(job_dir / REUSED_FILE, {**document, "reused": True, "run_id": earlier.run_id})
