"""Kill workers and drivers at random moments: nothing is lost, nothing is left, the sweep goes on.

Left would be an orphaned process, a swap file, or a run that stays RUNNING.
"""

from __future__ import annotations

import json
import os
import random
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    files_named,
    job_runs,
    nothing_is_left,
    processes,
    run,
    start,
    statuses,
    text_of,
    wait_until,
)

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SWEEP_S = 400
"""Longest time that a sweep of this file may take: less than the test's own limit."""

WORKER_KILLS = 24
JOBS = 2 * WORKER_KILLS
"""More than kills: a job may end before its kill comes."""
DRIVER_KILLS = 8
DRIVER_JOBS = 3 * DRIVER_KILLS
"""More than get done between the kills, so that each kill hits a running driver."""
SIGNALS = (signal.SIGKILL, signal.SIGKILL, signal.SIGSEGV, signal.SIGTERM, signal.SIGABRT)
ENDINGS = {"ok", "killed", "error"}


def fresh_workers(folder: Path, seen: set[int]) -> Iterator[int]:
    """Return the pids of workers that were not there before."""
    for path in files_named(folder / "multirun", "workers.json"):
        for worker in json.loads(text_of(path) or "[]"):
            if worker["pid"] not in seen and Path(f"/proc/{worker['pid']}").exists():
                seen.add(worker["pid"])
                yield worker["pid"]


def test_workers_killed_at_random_moments_cost_their_own_jobs_only(
    tmp_path: Path, built_ops: list[str]
) -> None:
    chance = random.Random(3)
    seeds = f"batch.seed=range(0,{JOBS})"
    sweep = ("-m", *TINY, "offload=nvme", seeds, "format=json")
    process = start(tmp_path, *sweep)
    seen: set[int] = set()
    kills = 0
    longest_wait_s = 0.6
    while process.poll() is None and kills < WORKER_KILLS:
        for pid in fresh_workers(tmp_path, seen):
            time.sleep(chance.uniform(0.0, longest_wait_s))
            try:
                os.kill(pid, chance.choice(SIGNALS))
                kills += 1
            except ProcessLookupError:  # it was faster, as many will be on a fast machine
                longest_wait_s *= 0.8
        time.sleep(0.01)
    assert process.wait(SWEEP_S) == 1
    assert kills > WORKER_KILLS / 2
    jobs = json.loads((tmp_path / "stdout").read_text())["jobs"]
    assert len(jobs) == JOBS
    assert {job["status"] for job in jobs} <= ENDINGS
    assert all(job["reason"] for job in jobs if job["status"] != "ok")
    assert [logged["zinfer.status"] for logged in job_runs(tmp_path)] == [
        job["status"] for job in jobs
    ]
    nothing_is_left(tmp_path)

    again = run(tmp_path, *sweep)
    assert set(statuses(again)) == {"ok"}
    assert sum(bool(job.get("reused")) for job in document(again)["jobs"]) == sum(
        job["status"] == "ok" for job in jobs
    )


def test_drivers_killed_at_random_moments_are_cleaned_up_after_by_the_next_start(
    tmp_path: Path, built_ops: list[str]
) -> None:
    chance = random.Random(4)
    sweep = ("-m", *TINY, "offload=nvme", f"batch.seed=range(0,{DRIVER_JOBS})", "format=json")
    done_before = in_a_job = 0
    for _ in range(DRIVER_KILLS):
        process = start(tmp_path, *sweep)
        if chance.random() < 0.7:  # most of them in the middle of a job
            wait_until(lambda: any(fresh_workers(tmp_path, set())), 90, "worker")
        time.sleep(chance.uniform(0.0, 2.5))
        if process.poll() is not None:
            break  # a fast machine has done all jobs; those that hit one are counted
        in_a_job += any(fresh_workers(tmp_path, set()))
        process.kill()
        process.wait()
        wait_until(lambda: not processes(tmp_path), 30, "end of the workers")
        done = (
            sum(logged["mlflow"] == "FINISHED" for logged in job_runs(tmp_path))
            if (tmp_path / "mlflow.db").exists()
            else 0
        )
        assert done >= done_before  # nothing that was done is lost
        done_before = done
    assert in_a_job >= DRIVER_KILLS / 4
    last = run(tmp_path, *sweep)
    assert set(statuses(last)) == {"ok"}, last.stderr
    nothing_is_left(tmp_path)
    finished = [
        logged["zinfer.config_key"]
        for logged in job_runs(tmp_path)
        if logged["mlflow"] == "FINISHED"
    ]
    assert len(set(finished)) == DRIVER_JOBS
