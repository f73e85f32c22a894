"""Judge a measurement: is its median known, and was the machine its own while it was taken?

The model is pyperf, which warns "the benchmark result may be unstable" and says how many processes
it would take. Two questions are kept apart: `noisy` means too few repeats for this spread, more of
them help; `disturbed` means that the run measured someone else too, and has to be repeated.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from zinfer.job.stability import Stability
from zinfer.worker.surroundings import Surroundings

MEDIAN_ERROR = math.sqrt(math.pi / 2)
"""Standard error of a median over that of a mean, for many normal values."""
STUDENT_95 = (
    12.71, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262, 2.228,
    2.201, 2.179, 2.160, 2.145, 2.131, 2.120, 2.110, 2.101, 2.093, 2.086,
    2.080, 2.074, 2.069, 2.064, 2.060, 2.056, 2.052, 2.048, 2.045, 2.042,
)  # fmt: skip
"""Half-width of a 95 % interval in standard errors, for 1, 2, 3, ... degrees of freedom."""
NORMAL_95 = 1.96
FEWEST_REPEATS, MOST_REPEATS = 3, 10_000
NOISY_STDDEV, NOISY_EXTREME = 0.1, 0.5
"""Relative standard deviation, and distance of one repeat from the median, that pyperf warns of."""


@dataclass(frozen=True, kw_only=True)
class Limit:
    """From where on something makes a run noisy, and from where on disturbed."""

    noisy: float
    disturbed: float


SLOWER_THAN_CALIBRATED = Limit(noisy=1.25, disturbed=1.5)
"""Yardstick in the run over yardstick in the calibration."""
PACE_CHANGED = Limit(noisy=1.2, disturbed=1.5)
"""Mean yardstick of the run over its fastest."""
CORES_LACKING = Limit(noisy=0.15, disturbed=0.4)
"""Share of the run's threads for which other processes left no core."""
STOLEN = Limit(noisy=0.02, disturbed=0.1)
HELD_BACK = Limit(noisy=0.02, disturbed=0.2)
"""Share of the time in which a limit on the container's processor time held it back."""
FREQUENCY_LOST = Limit(noisy=0.15, disturbed=0.4)
OTHER_JOBS = Limit(noisy=1, disturbed=1)
"""Other jobs on the same machine share its memory, disks and links, whatever the processor does."""
OVERLOAD = Limit(noisy=1.5, disturbed=4.0)
"""Load average over the machine's cores; where the kernel shows no better number."""


@dataclass(frozen=True, kw_only=True)
class Evidence:
    """Facts that a run knows of its own circumstances."""

    totals_s: Sequence[float]
    """Time of each timed generation."""
    yardstick_s: Sequence[float]
    calibrated_yardstick_s: float | None
    threads: int
    """Threads that compute, of all ranks on this host."""
    surroundings: Surroundings | None
    target_relative_error: float


def judge(evidence: Evidence) -> Stability:
    """Return the verdict with its reasons; the worst reason decides."""
    disturbed: list[str] = []
    noisy: list[str] = []
    for value, limit, said in _circumstances(evidence):
        if value >= limit.disturbed:
            disturbed.append(said)
        elif value >= limit.noisy:
            noisy.append(said)
    needed = repeats_needed(evidence.totals_s, evidence.target_relative_error)
    spread = list(_spread(evidence, needed))
    needed = needed if spread else None
    if disturbed:
        return Stability(
            verdict="disturbed", reasons=(*disturbed, *noisy, *spread), repeats_needed=needed
        )
    if noisy or spread:
        return Stability(verdict="noisy", reasons=(*noisy, *spread), repeats_needed=needed)
    return Stability(verdict="stable")


def relative_error(values: Sequence[float]) -> float:
    """Return the half-width of the median's 95 % interval over the median; infinite for one value.

    Source: the standard error of a mean with Student's t, times that of a median.
    """
    if len(values) < 2:
        return math.inf
    return _half_width(len(values), statistics.stdev(values)) / statistics.median(values)


def repeats_needed(values: Sequence[float], target_relative_error: float) -> int | None:
    """Return how many repeats of this spread tell the median to the target.

    None where so many were made already. A single value shows no spread: then as many as do.
    """
    if len(values) < 2:
        return FEWEST_REPEATS
    if relative_error(values) <= target_relative_error:
        return None
    wanted = target_relative_error * statistics.median(values)
    stddev = statistics.stdev(values)
    least = len(values) + 1
    for count in range(least, len(STUDENT_95) + 2):
        if _half_width(count, stddev) <= wanted:
            return count
    count = math.ceil((NORMAL_95 * MEDIAN_ERROR * stddev / wanted) ** 2)
    return min(max(count, least), MOST_REPEATS)


def warning(stability: Stability) -> str | None:
    """Return what a person is told at the end of the run; None for a stable one."""
    if stability.verdict == "stable":
        return None
    advice = "Run it again on a quiet machine"
    if stability.verdict == "noisy" and stability.repeats_needed is not None:
        advice = f"Set batch.repeats={stability.repeats_needed}, or batch.max_repeats"
    return f"this measurement is {stability.verdict}: {'; '.join(stability.reasons)}. {advice}"


def _half_width(count: int, stddev: float) -> float:
    """Return half of the 95 % interval of the median of so many values."""
    freedom = count - 1
    factor = STUDENT_95[freedom - 1] if freedom <= len(STUDENT_95) else NORMAL_95
    return factor * MEDIAN_ERROR * stddev / math.sqrt(count)


def _spread(evidence: Evidence, needed: int | None) -> Iterator[str]:
    """Yield what the repeats themselves show."""
    values = evidence.totals_s
    if len(values) < 2:
        yield "one timed generation shows no spread"
        return
    middle = statistics.median(values)
    stddev = statistics.stdev(values) / middle
    farthest = max(abs(value - middle) for value in values) / middle
    if needed is None or (stddev < NOISY_STDDEV and farthest < NOISY_EXTREME):
        return
    yield (
        f"{len(values)} repeats differ by a standard deviation of {stddev:.0%} of their median, "
        f"the farthest by {farthest:.0%}; {needed} repeats would tell the median to "
        f"{evidence.target_relative_error:.0%}"
    )


def _circumstances(evidence: Evidence) -> Iterator[tuple[float, Limit, str]]:
    """Yield (value, limit, sentence) of everything outside the run that is known."""
    yardstick = statistics.fmean(evidence.yardstick_s)
    if evidence.calibrated_yardstick_s:
        slower = yardstick / evidence.calibrated_yardstick_s
        yield (
            slower,
            SLOWER_THAN_CALIBRATED,
            f"the processor was {slower:.1f} times slower than when it was calibrated",
        )
    changed = yardstick / min(evidence.yardstick_s)
    yield changed, PACE_CHANGED, f"the processor's pace changed by {changed - 1:.0%} during the run"
    around = evidence.surroundings
    if around is None:
        return
    if around.other_jobs:
        jobs = "another job" if around.other_jobs == 1 else f"{around.other_jobs} other jobs"
        yield around.other_jobs, OTHER_JOBS, f"{jobs} of zinfer ran on this machine meanwhile"
    if around.others_cores is not None:
        free = around.cores - around.others_cores
        lacking = max(0.0, 1 - free / evidence.threads) if evidence.threads else 0.0
        yield (
            lacking,
            CORES_LACKING,
            f"other processes used {around.others_cores:.1f} of {around.cores} cores, and this run "
            f"computes with {evidence.threads} threads",
        )
    else:
        load = max(around.load_before or 0.0, around.load_after or 0.0) - evidence.threads
        share = load / around.machine_cores
        yield share, OVERLOAD, f"the load average was {load + evidence.threads:.1f}"
    if around.steal_share is not None:
        yield (
            around.steal_share,
            STOLEN,
            f"the hypervisor gave {around.steal_share:.0%} of the processors' time to others",
        )
    if around.cgroup_throttled_share is not None:
        yield (
            around.cgroup_throttled_share,
            HELD_BACK,
            "the container's limit on processor time held the run back for "
            f"{around.cgroup_throttled_share:.0%} of its time",
        )
    if around.slowest_frequency_share is not None:
        lost = 1 - around.slowest_frequency_share
        yield lost, FREQUENCY_LOST, f"the processor's frequency changed by {lost:.0%}"
    if around.throttle_events:
        yield HELD_BACK.noisy, HELD_BACK, f"heat slowed a core {around.throttle_events} times"
