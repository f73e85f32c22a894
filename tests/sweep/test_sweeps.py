"""Sweeps that survive what their jobs do, say what they will do, and go on where they were."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    events_of,
    files_named,
    job_runs,
    nothing_is_left,
    processes,
    run,
    runs,
    start,
    statuses,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate

pytestmark = pytest.mark.slow


def test_whatever_happens_to_a_job_the_others_run_and_nothing_is_left(
    tmp_path: Path, built_ops: list[str]
) -> None:
    seeds = (
        1,
        fate.RAISE,
        fate.EXIT,
        fate.SEGFAULT,
        fate.KILLED,
        fate.MEMORY,
        fate.TORCH_MEMORY,
        fate.HANG,
        2,
    )
    sweep = (
        "-m",
        *TINY,
        "offload=nvme",
        f"batch.seed={','.join(map(str, seeds))}",
        "launcher.timeout_s=30",
        "format=json",
    )
    done = run(tmp_path, *sweep, misbehaving=True)
    expected = ["ok", "error", "error", "killed", "killed", "oom_host", "oom_host", "timeout", "ok"]
    assert statuses(done) == expected, done.stderr
    assert done.returncode == 1
    reasons = [job.get("reason") or "" for job in document(done)["jobs"]]
    for index, words in (
        (1, "unlucky"),
        (2, "exit code 3"),
        (3, "SIGSEGV"),
        (4, "SIGKILL"),
        (7, "launcher.timeout_s=30"),
    ):
        assert words in reasons[index]
    logged = job_runs(tmp_path)
    assert [run["zinfer.status"] for run in logged] == expected
    mlflow = {"ok": "FINISHED", "killed": "KILLED", "timeout": "KILLED"}
    assert [run["mlflow"] for run in logged] == [
        mlflow.get(status, "FAILED") for status in expected
    ]
    assert [run["repeats"] for run in logged] == [
        2,
        *[1] * 7,
        2,
    ]  # the sample that each had is kept
    (parent,) = [run for run in runs(tmp_path) if run["role"] == "sweep"]
    assert parent["mlflow"] == "FAILED"
    assert "HYDRA_FULL_ERROR" not in done.stderr
    nothing_is_left(tmp_path)

    again = run(tmp_path, *sweep)  # nobody misbehaves any more
    assert statuses(again) == ["ok"] * 9
    assert again.returncode == 0
    assert [bool(job.get("reused")) for job in document(again)["jobs"]] == [
        True,
        *[False] * 7,
        True,
    ]
    nothing_is_left(tmp_path)


def test_a_sweep_says_what_it_will_do_then_does_it_once(tmp_path: Path) -> None:
    sweep = ("-m", *TINY, "offload=none,cpu", "batch.batch_size=1,2")
    preview = run(tmp_path, *sweep, "sweep.preview=true", "format=json")
    assert preview.returncode == 0
    jobs = document(preview)["jobs"]
    assert [(job["state"], job["verdict"]) for job in jobs] == [("run", "fits")] * 4
    assert all(job["needed_bytes"]["host"] > 0 for job in jobs)
    assert not (tmp_path / "mlflow.db").exists()

    first = run(tmp_path, *sweep)
    assert first.returncode == 0, first.stderr
    assert "4 jobs:" in first.stderr
    assert "[4/4] tiny-llama offload=cpu batch.batch_size=2:" in first.stderr
    assert first.stdout.count(" ok ") == 4

    second = run(tmp_path, *sweep, "format=json")  # how fast: bench/bench_sweep.py
    ids = [found["run_id"] for found in job_runs(tmp_path)]
    assert [(job["reused"], job["run_id"]) for job in document(second)["jobs"]] == [
        (True, run_id) for run_id in ids
    ]
    assert len(ids) == 4

    wider = run(tmp_path, "-m", *TINY, "offload=none,cpu", "batch.batch_size=1,4", "format=json")
    assert [job.get("reused", False) for job in document(wider)["jobs"]] == [
        True,
        False,
        True,
        False,
    ]
    anew = run(
        tmp_path,
        "-m",
        *TINY,
        "offload=none",
        "batch.batch_size=1,2",
        "sweep.resume=false",
        "format=json",
    )
    assert statuses(anew) == ["ok", "ok"]
    assert not any(job.get("reused") for job in document(anew)["jobs"])


def test_preview_names_what_will_be_refused(tmp_path: Path) -> None:
    jobs = (
        "-m",
        "model=tiny-llama",
        "batch.batch_size=2,1000000000",
        "dtype=float32",
        "hardware.accelerator=cpu",
        "tracking=none",
    )
    done = run(tmp_path, *jobs, "sweep.preview=true")
    assert done.returncode == 2
    assert "fits" in done.stdout and "will be refused" in done.stdout
    refused = run(tmp_path, *jobs, "batch.repeats=0", "sweep.preview=true", "format=json")
    assert [job["verdict"] for job in document(refused)["jobs"]] == ["refused", "refused"]


def test_fail_fast_starts_no_job_after_the_first_failure(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "-m",
        *TINY,
        f"batch.seed=1,{fate.RAISE},2,3",
        "sweep.fail_fast=true",
        "format=json",
        misbehaving=True,
    )
    assert statuses(done) == ["ok", "error", "not_run", "not_run"]
    assert done.returncode == 1


def test_interrupted_sweep_ends_and_goes_on_where_it_was(tmp_path: Path) -> None:
    seeds = f"batch.seed=1,{fate.HANG},2"
    process = start(tmp_path, "-m", *TINY, "offload=nvme", seeds, misbehaving=True)
    wait_until(lambda: len(events_of(tmp_path, "sample")) == 2, 90, "sample of the second job")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130  # how fast: bench/bench_sweep.py
    nothing_is_left(tmp_path)
    assert [(found["zinfer.status"], found["mlflow"]) for found in job_runs(tmp_path)] == [
        ("ok", "FINISHED"),
        ("killed", "KILLED"),
    ]
    err = (tmp_path / "stderr").read_text()
    assert f"zinfer -m {' '.join(TINY)} offload=nvme {seeds}" in err
    assert "Traceback" not in err
    again = run(tmp_path, "-m", *TINY, "offload=nvme", seeds, "format=json")
    assert [job.get("reused", False) for job in document(again)["jobs"]] == [True, False, False]
    assert statuses(again) == ["ok"] * 3


@pytest.mark.parametrize("forked", ["false"])  # tests/driver/test_kills.py has forked ones
def test_a_killed_driver_takes_its_worker_along_and_is_cleaned_up_after(
    forked: str, tmp_path: Path
) -> None:
    process = start(
        tmp_path,
        "-m",
        *TINY,
        "offload=nvme",
        f"batch.seed=1,{fate.SLEEP},2",
        f"launcher.fork_workers={forked}",
        misbehaving=True,
    )
    wait_until(lambda: len(events_of(tmp_path, "sample")) == 2, 90, "sample of the second job")
    process.kill()
    process.wait()
    wait_until(lambda: not processes(tmp_path), 30, "end of the worker and its server")
    assert [found["mlflow"] for found in runs(tmp_path)].count(
        "RUNNING"
    ) == 2  # the job, and the sweep
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    done = run(elsewhere, *TINY)  # a run, not a plan: plans wait for nobody's store
    assert done.returncode == 0
    assert "the driver was killed" in done.stderr
    nothing_is_left(tmp_path)
    closed = job_runs(tmp_path)[1]
    assert (closed["zinfer.status"], closed["mlflow"], closed["repeats"]) == ("killed", "KILLED", 1)
    again = run(tmp_path, "-m", *TINY, "offload=nvme", "batch.seed=1,2", "format=json")
    assert [job.get("reused", False) for job in document(again)["jobs"]] == [True, False]


def test_a_worker_server_that_dies_costs_one_job(tmp_path: Path) -> None:
    process = start(
        tmp_path, "-m", *TINY, f"batch.seed={fate.SLEEP},1", "format=json", misbehaving=True
    )
    wait_until(lambda: events_of(tmp_path, "sample"), 90, "sample")
    worker = json.loads(files_named(tmp_path, "workers.json")[0].read_text())[0]["pid"]
    server = int(Path(f"/proc/{worker}/stat").read_text().rpartition(")")[2].split()[1])
    os.kill(server, signal.SIGKILL)
    with suppress(ProcessLookupError):  # it may have ended with its server
        os.kill(worker, signal.SIGKILL)
    assert process.wait(300) == 1
    done = subprocess.CompletedProcess([], 1, (tmp_path / "stdout").read_text())
    assert statuses(done) == ["killed", "ok"]
    nothing_is_left(tmp_path)
