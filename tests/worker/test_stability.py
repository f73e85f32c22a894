"""Verdicts on measurements, from invented samples and from invented /proc files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.config import ConfigError
from zinfer.job.stability import Stability
from zinfer.worker.stability import (
    Evidence,
    judge,
    relative_error,
    repeats_needed,
    warning,
)
from zinfer.worker.surroundings import Look, Surroundings, between, look

QUIET = Surroundings(
    seconds=10.0,
    cores=4,
    machine_cores=4,
    others_cores=0.05,
    steal_share=0.0,
    load_before=1.0,
    load_after=4.0,
    slowest_frequency_share=0.98,
    throttle_events=0,
    cgroup_throttled_share=0.0,
)
CALM = Evidence(
    totals_s=(1.00, 1.01, 0.99),
    yardstick_s=(0.010, 0.0101, 0.0099, 0.010),
    calibrated_yardstick_s=0.010,
    threads=4,
    surroundings=QUIET,
    target_relative_error=0.05,
)
CASES = {
    "quiet": (CALM, "stable", ""),
    "not calibrated": (replace(CALM, calibrated_yardstick_s=None), "stable", ""),
    "nothing known": (replace(CALM, surroundings=None), "stable", ""),
    "another job": (
        replace(CALM, surroundings=replace(QUIET, other_jobs=1)),
        "disturbed",
        "another job of zinfer ran on this machine",
    ),
    "one repeat": (replace(CALM, totals_s=(1.0,)), "noisy", "one timed generation"),
    "wide spread": (
        replace(CALM, totals_s=(1.0, 1.2, 0.8)),
        "noisy",
        "3 repeats differ by a standard deviation of 20% of their median, the farthest by 20%",
    ),
    "one outlier of many": (
        replace(CALM, totals_s=(*[1.0] * 30, 1.6)),
        "stable",  # the median is known all the same
        "",
    ),
    "one outlier of few": (
        replace(CALM, totals_s=(1.0, 1.0, 1.6)),
        "noisy",
        "the farthest by 60%",
    ),
    "fifty times slower": (
        replace(CALM, yardstick_s=(0.5, 0.5, 0.5, 0.5)),
        "disturbed",
        "the processor was 50.0 times slower than when it was calibrated",
    ),
    "a third slower": (
        replace(CALM, yardstick_s=(0.0135,) * 4),
        "noisy",
        "1.3 times slower than when it was calibrated",
    ),
    "pace changed": (
        replace(CALM, yardstick_s=(0.010, 0.010, 0.021, 0.022), calibrated_yardstick_s=None),
        "disturbed",
        "pace changed by 57% during the run",
    ),
    "a build beside it": (
        replace(CALM, surroundings=replace(QUIET, others_cores=3.2)),
        "disturbed",
        "other processes used 3.2 of 4 cores, and this run computes with 4 threads",
    ),
    "a build on cores that are free": (
        replace(CALM, threads=1, surroundings=replace(QUIET, others_cores=2.9)),
        "stable",
        "",
    ),
    "some of a core": (
        replace(CALM, surroundings=replace(QUIET, others_cores=0.8)),
        "noisy",
        "other processes used 0.8 of 4 cores",
    ),
    "stolen": (
        replace(CALM, surroundings=replace(QUIET, steal_share=0.3)),
        "disturbed",
        "the hypervisor gave 30% of the processors' time to others",
    ),
    "held back": (
        replace(CALM, surroundings=replace(QUIET, cgroup_throttled_share=0.5)),
        "disturbed",
        "held the run back for 50% of its time",
    ),
    "slower clock": (
        replace(CALM, surroundings=replace(QUIET, slowest_frequency_share=0.5)),
        "disturbed",
        "frequency changed by 50%",
    ),
    "hot": (
        replace(CALM, surroundings=replace(QUIET, throttle_events=7)),
        "noisy",
        "heat slowed a core 7 times",
    ),
    "overloaded where only the load is known": (
        replace(CALM, surroundings=replace(QUIET, others_cores=None, load_after=60.0)),
        "disturbed",
        "the load average was 60.0",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_the_verdict_follows_from_the_evidence(name: str) -> None:
    evidence, verdict, reason = CASES[name]
    found = judge(evidence)
    assert found.verdict == verdict, found
    assert reason in "; ".join(found.reasons)
    assert bool(found.reasons) == (verdict != "stable")
    said = warning(found)
    assert (said is None) == (verdict == "stable")
    if said:
        assert said.startswith(f"this measurement is {verdict}: ")
        assert ("Set batch.repeats=" in said) == (
            verdict == "noisy" and found.repeats_needed is not None
        )


def test_a_disturbed_run_keeps_all_its_reasons() -> None:
    worst = replace(
        CALM, totals_s=(1.0, 2.0), surroundings=replace(QUIET, others_cores=3.9, steal_share=0.03)
    )
    found = judge(worst)
    assert (found.verdict, len(found.reasons)) == ("disturbed", 3)
    assert found.document()["reasons"] == list(found.reasons)


@pytest.mark.parametrize(
    ("values", "target", "needed"),
    [
        ((1.0, 1.0, 1.0), 0.05, None),
        ((1.0,), 0.05, 3),
        # s = 0.1: 95 % of a normal mean lie within 1.96 s / sqrt(n), of a median 1.2533 times that.
        ((0.9, 1.0, 1.1), 0.05, 27),
        ((0.9, 1.0, 1.1), 0.01, 604),
        ((0.9, 1.0, 1.1), 0.5, None),
        ((0.5, 1.0, 1.5), 0.0001, 10_000),
    ],
)
def test_repeats_that_are_needed(
    values: tuple[float, ...], target: float, needed: int | None
) -> None:
    assert repeats_needed(values, target) == needed
    assert (needed is None) == (relative_error(values) <= target)


def test_the_number_of_repeats_is_said() -> None:
    said = warning(judge(replace(CALM, totals_s=(0.8, 1.0, 1.2))))
    assert said is not None
    needed = repeats_needed((0.8, 1.0, 1.2), 0.05)
    assert f"Set batch.repeats={needed}, or batch.max_repeats" in said
    assert warning(Stability(verdict="stable")) is None


def machine(root: Path, busy_ticks: int, steal: int = 0, throttled: int = 0) -> Path:
    """Make a root with the files of a machine whose processors were busy so many ticks each."""
    import os

    cores = sorted(os.sched_getaffinity(0))
    files = {
        "proc/stat": "cpu 0\n"
        + "".join(f"cpu{core} {busy_ticks} 0 0 9 9 9 9 {steal} 0 0\n" for core in cores),
        "proc/loadavg": "3.50 2.00 1.00 2/300 4242\n",
        "proc/self/cgroup": "0::/\n",
        "proc/self/mountinfo": "30 20 0:26 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw\n",
        "sys/fs/cgroup/cpu.stat": f"usage_usec 5\nthrottled_usec {throttled}\n",
        f"sys/devices/system/cpu/cpu{cores[0]}/cpufreq/scaling_cur_freq": "2400000\n",
        f"sys/devices/system/cpu/cpu{cores[0]}/thermal_throttle/core_throttle_count": "3\n",
    }
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_a_look_reads_what_the_kernel_shows(tmp_path: Path) -> None:
    found = look(machine(tmp_path, 1000, steal=100, throttled=2_000_000))
    assert found.busy_s == pytest.approx(11.0 * found.cores)
    assert found.steal_s == pytest.approx(1.0 * found.cores)
    assert found.frequency_hz == 2.4e9
    assert (found.throttle_events, found.load_average) == (3, 3.5)
    assert found.cgroup_throttled_s == 2.0
    nothing = look(tmp_path / "nowhere")
    assert (nothing.busy_s, nothing.frequency_hz, nothing.load_average) == (None, None, None)


def test_others_are_what_is_busy_without_this_run(tmp_path: Path) -> None:
    before = look(machine(tmp_path, 0))
    start = Look(**{**vars(before), "time_s": 100.0, "own_s": 5.0, "busy_s": 50.0, "steal_s": 0.0})
    end = replace(start, time_s=110.0, own_s=13.0, busy_s=82.0, steal_s=1.0, frequency_hz=1.2e9)
    one, two = between(start, end, ranks=1), between(start, end, ranks=2)
    assert one.others_cores == pytest.approx(2.4)
    assert two.others_cores == pytest.approx(1.6)
    assert one.steal_share == pytest.approx(1.0 / 10 / start.cores)
    assert one.slowest_frequency_share == pytest.approx(0.5)


def test_this_machine_can_be_looked_at() -> None:
    found = between(look(), look())
    assert found.seconds >= 0 and found.cores >= 1


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("batch.max_repeats=2", r"batch\.max_repeats=2 is less.*Set batch\.max_repeats=30"),
        ("batch.target_relative_error=0", r"batch\.target_relative_error=0\S* is too small"),
        ("batch.target_relative_error=5", r"batch\.target_relative_error=5\S* is too large"),
    ],
)
def test_a_target_that_cannot_be_reached_is_refused(override: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        composed("batch.repeats=3", override)
