"""A calibration within a budget: what it runs, what it leaves out, and what it says of its time."""

from __future__ import annotations

import io
from itertools import count
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.composing import composed
from zinfer.calibration import measure as measuring
from zinfer.calibration.measure import Measurement
from zinfer.calibration.schedule import Clock, by_need, expected_s, runs_left
from zinfer.calibration.task import expectation
from zinfer.driver.terminal import Terminal
from zinfer.job.calibration import (
    BY_MODULE,
    DISK,
    ESSENTIAL,
    LARGE,
    LARGE_BATCH,
    Job,
    jobs,
)

DTYPES = ("float32", "bfloat16")


def test_what_matters_most_comes_first_and_every_job_is_of_one_group() -> None:
    chosen = jobs(("bfloat16", "float32"), nvme=True, cpu_offload=False)
    groups = by_need(chosen, ("bfloat16", "float32"))
    assert [group for group, _ in groups] == [
        ESSENTIAL, LARGE, DISK, "float32", "the family bloom", "the family mixtral", BY_MODULE,
        LARGE_BATCH,
    ]  # fmt: skip
    assert sorted(map(str, chosen)) == sorted(str(job) for _, members in groups for job in members)
    assert {job.dtype for group, members in groups for job in members if group != "float32"} == {
        "bfloat16"
    }


@pytest.mark.parametrize(
    ("nvme", "cpu_offload", "dtypes"),
    [(True, False, DTYPES), (False, False, ("float32",)), (True, True, DTYPES)],
)
def test_essential_jobs_are_few(nvme: bool, cpu_offload: bool, dtypes: tuple[str, ...]) -> None:
    chosen = jobs(dtypes, nvme=nvme, cpu_offload=cpu_offload)
    essential = [job for job in chosen if job.group == ESSENTIAL]
    assert len(essential) == 10 + 4 * cpu_offload
    assert {job.family for job in essential} == {"llama", "opt"}


class FakeTime:
    """Seconds that pass only when a job runs."""

    def __init__(self) -> None:
        self.now_s = 1000.0

    def monotonic(self) -> float:
        return self.now_s


def fake_runs(monkeypatch: pytest.MonkeyPatch, job_s: float) -> list[Job]:
    """Let jobs take `job_s`, kernels ten times that: neither can run here in a second."""
    ran: list[Job] = []
    time = FakeTime()
    monkeypatch.setattr("zinfer.calibration.schedule.time", time)
    monkeypatch.setattr("zinfer.calibration.measure.time", time)

    def run(self: Measurement, job: Job) -> Any:
        time.now_s += job_s
        self.clock.ran(job_s)
        ran.append(job)
        config = measuring.job_config(job, self.config)
        return job, config, result(job, speed=job_s)

    def kernels(self: Measurement) -> None:
        time.now_s += 10 * job_s
        rows = [(1.0, "float32"), (8.0, "bfloat16")]
        self.kernels = {
            "kernels": [
                {"dtype": kind, "rows": 1, "weight_numel": 1, "seconds": seconds}
                for seconds, kind in rows
            ]
        }

    monkeypatch.setattr(Measurement, "_run", run)
    monkeypatch.setattr(Measurement, "measure_kernels", kernels)
    return ran


def result(job: Job, *, speed: float) -> dict[str, Any]:
    """Return a result whose runs never agree: each is slower than the one before."""
    seconds = next(SLOWER) * speed
    sample = {"kind": "timed", "prefill_s": seconds, "decode_step_s": [seconds] * 11}
    return {"samples": [sample, sample], "metrics": {}}


SLOWER = (0.01 * 1.1**run for run in count())


@pytest.mark.parametrize(
    ("job_s", "budget_s", "left_out"),
    [
        (1.0, 1000.0, []),
        (1.0, 15.0, [LARGE, DISK, "bfloat16", "the family bloom", "the family mixtral", BY_MODULE,
                     LARGE_BATCH]),
        (1.0, 29.0, ["bfloat16", "the family bloom", "the family mixtral", LARGE_BATCH]),
        (5.0, 60.0, [LARGE, DISK, "bfloat16", "the family bloom", "the family mixtral", BY_MODULE,
                     LARGE_BATCH]),
    ],
)  # fmt: skip
def test_a_budget_leaves_out_what_matters_least(
    job_s: float,
    budget_s: float,
    left_out: list[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    ran = fake_runs(monkeypatch, job_s)
    err = io.StringIO()
    measurement = Measurement(
        config=composed("hardware.accelerator=cpu", "task=calibrate"),
        folder=tmp_path,
        terminal=Terminal("text", err=err),
        clock=Clock(budget_s=budget_s),
    )
    measurement.within_budget(DTYPES, cpu_offload=False)
    assert list(measurement.left_out) == left_out
    essentials_s = 10 * job_s + 10 * job_s
    assert measurement.clock.elapsed_s <= max(budget_s, essentials_s)
    assert {job.group for job in ran}.isdisjoint(left_out)
    assert {job.dtype for job in ran if job.mode == "none"} >= {"float32"}  # the faster one here


def test_progress_is_said_in_lines_where_there_is_no_live_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_runs(monkeypatch, 3.0)
    err = io.StringIO()
    measurement = Measurement(
        config=composed("hardware.accelerator=cpu", "task=calibrate"),
        folder=tmp_path,
        terminal=Terminal("text", err=err),
        clock=Clock(budget_s=None),
    )
    measurement.everything(jobs(DTYPES, nvme=True, cpu_offload=False))
    lines = err.getvalue().splitlines()
    assert 5 < len(lines) < 40
    assert all("left" in line and " of " in line for line in lines)
    assert "minutes left" in lines[0] and lines[-1].endswith("seconds left")


def test_the_expectation_names_the_override() -> None:
    chosen = jobs(DTYPES, nvme=True, cpu_offload=False)
    least_s, most_s = expected_s(chosen)
    assert 60 < least_s < most_s < 300  # 85 to 175 s were measured on two cores
    assert "calibrate.budget_s=60" in expectation(chosen, None)
    assert "in 45 s" in expectation(chosen, 45.0)
    assert runs_left(0, chosen, 2) == 0


@pytest.mark.parametrize(
    ("elapsed_s", "certain", "left_s"),
    [(0.0, 0, 8.0), (7.0, 0, 1.0), (30.0, 0, 0.0), (30.0, 5, 10.0)],
)
def test_jobs_that_are_run_whatever_the_budget_are_part_of_the_time_left(
    elapsed_s: float, certain: int, left_s: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    time = FakeTime()
    monkeypatch.setattr("zinfer.calibration.schedule.time", time)
    clock = Clock(budget_s=8.0)
    time.now_s += elapsed_s
    clock.ran(2.0)
    assert clock.left_s(5.0, kernels=False, certain=certain) == left_s
