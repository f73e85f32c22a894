"""Divide a calibration's time: what is run, in which order, and how much time is left."""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, field

from zinfer.job.calibration import ESSENTIAL, Job, groups_by_need

FIRST_JOB_S, JOB_S, KERNELS_S = 8.0, 1.2, 17.0
"""Seconds on two cores of an AMD EPYC: the first job with its imports, each further job, and the
kernels. What this machine takes replaces the second as soon as jobs have run."""
RUNS_A_JOB = 2.0
"""How often a job runs until its runs agree, about."""


@dataclass
class Clock:
    """Measure how fast this machine calibrates, and say what is left."""

    budget_s: float | None
    """calibrate.budget_s; None has no limit."""
    started_s: float = field(default_factory=lambda: time.monotonic())
    _runs_s: list[float] = field(default_factory=list)

    @property
    def elapsed_s(self) -> float:
        """Return seconds since the start."""
        return time.monotonic() - self.started_s

    @property
    def job_s(self) -> float:
        """Return seconds that a job is expected to take here."""
        return sum(self._runs_s) / len(self._runs_s) if self._runs_s else JOB_S

    def ran(self, seconds: float) -> None:
        """Note what one job took that did not wait for imports."""
        self._runs_s.append(seconds)

    def allows(self, runs: int) -> bool:
        """Return whether so many more runs fit into the budget."""
        return self.budget_s is None or self.elapsed_s + runs * self.job_s <= self.budget_s

    def left_s(self, runs: float, kernels: bool, certain: int = 0) -> float:
        """Return seconds that so many runs, and kernels still to come, will take.

        Args:
            certain: runs that are made even if the budget is used up.
        """
        left_s = runs * self.job_s + kernels * KERNELS_S * self.job_s / JOB_S
        if self.budget_s is None:
            return left_s
        return min(left_s, max(certain * self.job_s, self.budget_s - self.elapsed_s))


def expected_s(chosen: Sequence[Job]) -> tuple[float, float]:
    """Return the least and the most seconds of a whole calibration, before anything has run."""
    once = FIRST_JOB_S + KERNELS_S + len(chosen) * JOB_S
    return once, FIRST_JOB_S + KERNELS_S + sum(job.rounds for job in chosen) * JOB_S * 1.5


def runs_left(rest_of_round: int, later: Sequence[Job], number: int) -> float:
    """Return the runs that are expected still to come.

    Args:
        rest_of_round: jobs of this round that have not run.
        later: all jobs.
        number: of this round, from 0.
    """
    again = sum(job.rounds > number + 1 for job in later)
    return rest_of_round + again * max(0.0, RUNS_A_JOB - 1 - number)


def by_need(chosen: Sequence[Job], dtypes: Sequence[str]) -> list[tuple[str, list[Job]]]:
    """Return the jobs in groups, the one that matters most first; ESSENTIAL is always run."""
    groups = groups_by_need(chosen, dtypes)
    assert groups[0] == ESSENTIAL, "there is no calibration without the essential jobs"
    return [(group, [job for job in chosen if job.group == group]) for group in groups]
