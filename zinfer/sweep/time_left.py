"""Estimate how long a sweep still takes, from those of its jobs that are like the ones to come.

A job is like another when it has the same task. Of those the ones of comparable size count: their
loading takes as long, and their generations scale with the size. Jobs that were refused, reused or
failed say nothing, and neither does the wait for imports that all jobs share.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass

COMPARABLE = 2.0
"""Jobs whose sizes differ by no more than this factor tell each other's time."""


@dataclass(frozen=True, kw_only=True)
class JobSize:
    """Says how large a job is, before it runs."""

    task: str
    predicted_s: float | None = None
    """Predicted seconds of all its generations; None: the machine is not calibrated."""
    work_bytes: float | None = None
    """Bytes of the weights, times all its passes; a measure of size where nothing is predicted."""

    def ratio(self, other: JobSize) -> float:
        """Return how many times larger this job is than the other; 1 where nobody knows."""
        if self.predicted_s and other.predicted_s:
            return self.predicted_s / other.predicted_s
        if self.work_bytes and other.work_bytes:
            return self.work_bytes / other.work_bytes
        return 1.0


@dataclass(frozen=True, kw_only=True)
class TimedJob:
    """A job that ended well, and the time that it took without waiting for shared imports."""

    size: JobSize
    seconds: float
    generation_s: float = 0.0
    """Part of it in which the model generated."""

    def for_size(self, ratio: float) -> float:
        """Return the time of a job that is so many times as large."""
        return self.seconds - self.generation_s + self.generation_s * ratio


def expected_s(job: JobSize, done: Sequence[TimedJob]) -> float | None:
    """Return the seconds that this job will take; None while no like job has ended."""
    like = [(job.ratio(other.size), other) for other in done if other.size.task == job.task]
    if not like:
        return None
    close = [pair for pair in like if 1 / COMPARABLE <= pair[0] <= COMPARABLE]
    nearest = min(like, key=lambda pair: max(pair[0], 1 / pair[0]))
    return statistics.median(other.for_size(ratio) for ratio, other in close or [nearest])


def seconds_left(
    waiting: Sequence[JobSize],
    done: Sequence[TimedJob],
    *,
    running: Sequence[tuple[JobSize, float]] = (),
    gap_s: float = 0.0,
) -> float | None:
    """Return the seconds until the last job ends; None while it cannot be known.

    Args:
        waiting: jobs that will run. Refused and reused ones take no time and are left out.
        running: jobs that run side by side now, each with its seconds so far.
        gap_s: time between the end of a job and the start of the next.
    """
    whole = [expected_s(job, done) for job in waiting]
    rests = [(expected_s(job, done), so_far_s) for job, so_far_s in running]
    known = [each for each in whole if each is not None]
    known_rests = [max(0.0, each - so_far_s) for each, so_far_s in rests if each is not None]
    if len(known) < len(whole) or len(known_rests) < len(rests):
        return None
    one_by_one_s = sum(known) + gap_s * len(known) + sum(known_rests)
    return max(one_by_one_s / max(1, len(running)), max(known_rests, default=0.0))
