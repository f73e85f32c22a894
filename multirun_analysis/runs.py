"""A run as it was logged, and the selection of runs that a report is about."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

from zinfer.tracking.store import TrackingUnavailable

Json = dict[str, Any]
History = tuple[tuple[int, float], ...]
"""(step, value) of every point of a metric."""

STATUS_WORDS = {
    "ok": "measured",
    "planned": "planned only",
    "refused": "refused",
    "does_not_fit": "does not fit",
    "oom_device": "out of device memory",
    "oom_host": "out of host memory",
    "killed": "killed",
    "timeout": "timed out",
    "error": "failed",
    "running": "not ended",
}
"""Every status of a run, in words. `running` is a run that nobody has ended; the others are
those of zinfer.job.outcome."""
MEASURE = "Or measure first: zinfer -m offload=none,cpu,nvme"


class ReportError(TrackingUnavailable):
    """There is nothing to report, or it cannot be read.

    One sentence that says what to set instead; the command ends with exit code 2.
    """


@dataclass(frozen=True, kw_only=True)
class Run:
    """One job as it was logged."""

    run_id: str
    name: str
    experiment: str
    started: datetime | None
    status: str
    """A key of STATUS_WORDS."""
    reason: str | None
    """Why it did not end well."""
    params: Mapping[str, str]
    """Choices, flattened: model.name, offload.device, batch.batch_size."""
    metrics: Mapping[str, float]
    """Numbers by their names with unit; what is unknown is absent."""
    tags: Mapping[str, str]
    url: str | None = None
    """Of its page in MLflow."""
    reused: bool = False
    """Measured before this sweep, which took its result over."""

    @property
    def method_version(self) -> str:
        """Version of the timing method; `unknown` where the run does not say."""
        return self.tags.get("zinfer.method_version", "unknown")

    @property
    def warnings(self) -> tuple[str, ...]:
        """Sentences that the run said about itself."""
        return tuple(filter(None, self.tags.get("zinfer.warnings", "").splitlines()))

    @property
    def stability(self) -> str | None:
        """stable, noisy or disturbed; None for a run that gave no verdict."""
        return self.tags.get("zinfer.stability")


@dataclass(frozen=True, kw_only=True)
class Selection:
    """The runs that a report is about."""

    title: str
    where: str
    """The store or folder, without credentials."""
    runs: tuple[Run, ...]
    notes: tuple[str, ...] = ()
    """Sentences about what was left out or looks odd."""
    parent: str | None = None
    """Id of the sweep's own run, where the selection is one whole sweep."""
    history: Callable[[Run, str], History] = field(default=lambda run, metric: (), repr=False)
    """Every point of a metric: one request each, so only for the few runs of a figure."""
    environment: Callable[[Run], Json | None] = field(default=lambda run: None, repr=False)
    """environment.json of a run; None when it has none."""


def started_s(run: Run) -> float:
    """Return the start of a run in seconds since 1970, for sorting; 0 where it is not known."""
    return run.started.timestamp() if run.started else 0.0
