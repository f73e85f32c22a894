"""Read the ended runs of an experiment from its store: one query, whatever the number of jobs.

A sqlite store is read straight from its file, because importing MLflow takes seconds.
"""

from __future__ import annotations

import contextlib
import json
import sqlite3
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from zinfer.job.outcome import EndedBy, Json, Status
from zinfer.tracking.names import KEY_TAG, ROLE_TAG
from zinfer.tracking.parent import JOBS_TAG
from zinfer.tracking.reading import open_to_read
from zinfer.tracking.uri import sqlite_path

HEADLINE = "generated_tokens_per_s"
METRICS = (HEADLINE, "prefill_s", "decode_step_s", "peak_host_rss_bytes", "best_batch_size")
"""Metrics that the table of a sweep shows."""
STATUS_TAG, STABILITY_TAG = "zinfer.status", "zinfer.stability"
TAGS = (
    KEY_TAG, STATUS_TAG, STABILITY_TAG, "zinfer.reason", "zinfer.ended_by", "zinfer.job_dir",
)  # fmt: skip
ENDED = ("FINISHED", "FAILED", "KILLED")


@dataclass(frozen=True, kw_only=True)
class EarlierRun:
    """A job's run that has ended, as the store has it."""

    key: str
    run_id: str
    status: Status
    reason: str | None = None
    job_dir: str | None = None
    metrics: dict[str, float] = field(default_factory=dict)
    """Those of METRICS that it has."""
    ended_by: EndedBy = EndedBy.ITSELF
    stability: str | None = None
    """stable, noisy or disturbed; None where the run did not say."""

    @property
    def ended_well(self) -> bool:
        """Return whether it has numbers, or a plan."""
        return self.status in ("ok", "planned")

    @property
    def disturbed(self) -> bool:
        """Return whether the machine did something else while it was measured."""
        return self.stability == "disturbed"

    @property
    def tokens_per_s(self) -> float | None:
        """Return its generated_tokens_per_s."""
        return self.metrics.get(HEADLINE)

    @classmethod
    def read(cls, document: Json) -> EarlierRun:
        """Return the run that `asdict` made this document of."""
        return cls(**{**document, "ended_by": EndedBy(document["ended_by"])})

    @classmethod
    def stored(
        cls, run_id: str, tags: Mapping[str, str], metrics: Mapping[str, float]
    ) -> EarlierRun | None:
        """Return the run with these tags and metrics; None where it is no job of zinfer's."""
        if KEY_TAG not in tags or STATUS_TAG not in tags:
            return None
        status: Any = tags[STATUS_TAG]
        return cls(
            key=tags[KEY_TAG],
            run_id=run_id,
            status=status,
            reason=tags.get("zinfer.reason"),
            job_dir=tags.get("zinfer.job_dir"),
            metrics={name: metrics[name] for name in METRICS if name in metrics},
            ended_by=EndedBy(tags.get("zinfer.ended_by", EndedBy.ITSELF)),
            stability=tags.get(STABILITY_TAG),
        )


def ended_runs(uri: str, experiment: str) -> list[EarlierRun]:
    """Return every ended run of a job in this experiment, the newest last.

    An unreadable store has none; that it is unreadable is said when the first run is logged.
    """
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
    runs = f"""
        SELECT runs.run_uuid FROM runs JOIN experiments USING (experiment_id)
        WHERE experiments.name = ? AND runs.lifecycle_stage = 'active' AND runs.status IN {ENDED}
    """
    with open_to_read(path) as store:
        order = store.execute(f"{runs} ORDER BY runs.end_time", (experiment,)).fetchall()
        tags = _by_run(store, f"tags WHERE key IN {TAGS} AND run_uuid IN ({runs})", experiment)
        metrics = _by_run(
            store, f"latest_metrics WHERE key IN {METRICS} AND run_uuid IN ({runs})", experiment
        )
    for (run_id,) in order:
        found = EarlierRun.stored(run_id, tags.get(run_id, {}), metrics.get(run_id, {}))
        if found is not None:
            yield found


def _by_run(store: sqlite3.Connection, source: str, experiment: str) -> dict[str, dict[str, Any]]:
    """Return run id -> key -> value."""
    found: dict[str, dict[str, Any]] = {}
    rows = store.execute(f"SELECT run_uuid, key, value FROM {source}", (experiment,))
    for run_id, key, value in rows:
        found.setdefault(run_id, {})[key] = value
    return found


def runs_of_newest_sweep(uri: str, experiment: str) -> list[str] | None:
    """Return the ids, sorted, of the runs that the newest sweep of a sqlite store names.

    None where there is no sweep, or the store is another one.
    """
    path = sqlite_path(uri)
    if path is None or not path.exists():
        return None
    newest = """
        SELECT runs.run_uuid FROM runs JOIN experiments USING (experiment_id)
        JOIN tags ON tags.run_uuid = runs.run_uuid AND tags.key = ? AND tags.value = 'sweep'
        WHERE experiments.name = ? AND runs.lifecycle_stage = 'active'
        ORDER BY runs.start_time DESC LIMIT 1
    """
    jobs = f"SELECT value FROM tags WHERE key LIKE ? AND run_uuid IN ({newest})"
    try:
        with open_to_read(path) as store:
            tags = store.execute(jobs, (f"{JOBS_TAG}%", ROLE_TAG, experiment)).fetchall()
    except sqlite3.Error:
        return None
    entries = [entry for (value,) in tags for entry in json.loads(value)]
    return sorted(entry["run_id"] for entry in entries if entry["run_id"]) if tags else None


def _from_mlflow(uri: str, experiment: str) -> list[EarlierRun]:
    """Ask MLflow, for servers and other databases. A store that hangs has nothing to reuse."""
    from zinfer.tracking.deadline import STORE_TIMEOUT_S, within
    from zinfer.tracking.store import TrackingUnavailable

    try:
        return within(STORE_TIMEOUT_S, lambda: list(_asked_mlflow(uri, experiment)), "the store")
    except TrackingUnavailable:  # the first run says so
        return []


def _asked_mlflow(uri: str, experiment: str) -> Iterator[EarlierRun]:
    from zinfer.tracking.client import connect, store_errors
    from zinfer.tracking.store import TrackingUnavailable, ensure_store

    where = "tags.`zinfer.role` = 'job' and attributes.status != 'RUNNING'"
    with contextlib.suppress(TrackingUnavailable):
        ensure_store(uri)
        with store_errors(uri):
            client = connect(uri)
            found = client.get_experiment_by_name(experiment)
            token: Any = None
            while found is not None:
                page = client.search_runs(
                    [found.experiment_id],
                    where,
                    max_results=1000,
                    order_by=["end_time ASC"],
                    page_token=token,
                )
                for run in page:
                    earlier = EarlierRun.stored(run.info.run_id, run.data.tags, run.data.metrics)
                    if earlier is not None:
                        yield earlier
                token = page.token
                if not token:
                    return
