"""Sweeps on a real Slurm: whatever happens to a job, the sweep says it and the others go on."""

from __future__ import annotations

import json
import signal
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.slurm import FOUR, SMALL, Cluster, slurm_of_one_node
from tests.helpers.sweeping import (
    TINY,
    document,
    job_runs,
    nothing_is_left,
    run,
    runs,
    start,
    statuses,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate
from zinfer.job.records import read_json

pytest.importorskip(
    "hydra_plugins.hydra_submitit_launcher", reason="needs pip install 'zinfer[launchers]'"
)
pytestmark = [pytest.mark.slow, pytest.mark.slurm, pytest.mark.timeout(1200)]


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    for conf in slurm_of_one_node(tmp_path_factory.mktemp("slurm")):
        yield Cluster(conf)


def result(job_dir: Path) -> dict[str, Any]:
    found = read_json(job_dir / "result.json")
    return found if isinstance(found, dict) else {}


def has_sample(job_dir: Path) -> bool:
    events = job_dir / "events.jsonl"
    return events.exists() and '"sample"' in events.read_text()


def check_rows(folder: Path, *, parents: int) -> None:
    """Check that every run has ended, has its sweep as parent, and is ok only with numbers."""
    sweeps = {logged["run_id"] for logged in runs(folder) if logged["role"] == "sweep"}
    assert len(sweeps) == parents
    for logged in job_runs(folder):
        assert logged["mlflow"] != "RUNNING"
        assert logged["mlflow.parentRunId"] in sweeps
        assert (logged["zinfer.status"] == "ok") == (logged["mlflow"] == "FINISHED")
        if logged["zinfer.status"] == "ok":
            assert logged["repeats"] == 2


def test_a_real_slurm_runs_the_sweep_and_goes_on_with_it(slurm: Cluster, tmp_path: Path) -> None:
    sweep = ("-m", *SMALL, *TINY, f"batch.seed=1,{fate.KILLED},2", "format=json")
    done = run(tmp_path, *sweep, misbehaving=True, SLURM_CONF=slurm.conf)
    assert statuses(done) == ["ok", "killed", "ok"], done.stderr
    assert done.returncode == 1
    nothing_is_left(tmp_path)
    again = run(tmp_path, *sweep, SLURM_CONF=slurm.conf)
    assert [(job["status"], job.get("reused", False)) for job in document(again)["jobs"]] == [
        ("ok", True),
        ("ok", False),
        ("ok", True),
    ]


def test_cancelled_requeued_and_node_failed_jobs_are_told_apart(
    slurm: Cluster, tmp_path: Path
) -> None:
    swept = (f"batch.seed={fate.HANG},{fate.SLEEP},{fate.KILLED},3", "batch.batch_size=1,2")
    process = start(
        tmp_path, "-m", *SMALL, *TINY, "offload=nvme", *swept, "hydra.sweep.dir=S", "format=json",
        misbehaving=True, SLURM_CONF=slurm.conf,
    )  # fmt: skip
    folder = tmp_path / "S"
    wait_until(lambda: has_sample(folder / "0") and has_sample(folder / "1"), 180, "two jobs")
    array = slurm.array(folder)
    slurm("scancel", f"{array}_0")
    slurm("scontrol", "requeue", f"{array}_1")
    wait_until(lambda: has_sample(folder / "2") and has_sample(folder / "3"), 180, "two more")
    slurm.node_fails()
    again = folder / "1" / "earlier" / "1"  # the first attempt's files, once the next has begun
    wait_until(lambda: again.is_dir() and has_sample(folder / "1"), 400, "job 1 again")
    slurm("scancel", "--signal=USR2", f"{array}_1")  # what comes before a preemption
    wait_until((folder / "1" / "earlier" / "2").is_dir, 240, "third attempt at job 1")
    wait_until(lambda: has_sample(folder / "1"), 180, "job 1 once more")
    slurm("scancel", f"{array}_1")
    assert process.wait(600) == 1
    jobs = json.loads((tmp_path / "stdout").read_text())["jobs"]
    assert [job["status"] for job in jobs] == [
        "killed", "killed", "ok", "ok", "killed", "killed", "ok", "ok",
    ]  # fmt: skip
    assert all("interrupted by SIG" in job["reason"] for job in jobs[:2])
    assert "interrupted by SIG" in result(folder / "1" / "earlier" / "1")["reason"]
    assert "preemption (SIGUSR2)" in result(folder / "1" / "earlier" / "2")["reason"]
    failed = result(folder / "2" / "earlier" / "1")["reason"]  # Slurm sends SIGTERM first
    assert "the driver was killed" in failed or "interrupted by SIGTERM" in failed
    nothing_is_left(tmp_path)
    check_rows(tmp_path, parents=1)


def test_slurm_s_time_limit_ends_a_job_in_order(slurm: Cluster, tmp_path: Path) -> None:
    limit = ("hydra.launcher.timeout_min=2", "hydra.launcher.signal_delay_s=30")
    sweep = ("-m", *SMALL, *TINY, *limit, f"batch.seed={fate.HANG},1", "format=json")
    done = run(tmp_path, *sweep, misbehaving=True, SLURM_CONF=slurm.conf)
    assert statuses(done) == ["killed", "ok"], done.stderr
    assert done.returncode == 1
    assert "time limit or preemption (SIGUSR2)" in document(done)["jobs"][0]["reason"]
    assert document(done)["jobs"][0]["ended_by"] == "interrupted"
    nothing_is_left(tmp_path)
    check_rows(tmp_path, parents=1)


def test_ctrl_c_ends_running_jobs_and_takes_waiting_ones_out_of_the_queue(
    slurm: Cluster, tmp_path: Path
) -> None:
    seeds = f"batch.seed={fate.HANG},{fate.SLEEP},1,2,3,4"
    process = start(
        tmp_path, "-m", *SMALL, *TINY, seeds, "hydra.sweep.dir=S", "format=json",
        misbehaving=True, SLURM_CONF=slurm.conf,
    )  # fmt: skip
    folder = tmp_path / "S"
    wait_until(lambda: has_sample(folder / "0") and has_sample(folder / "1"), 180, "two jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(60) == 130
    jobs = json.loads((tmp_path / "stdout").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["killed"] * 2 + ["not_run"] * 4
    slurm.wait_until_empty(60)
    nothing_is_left(tmp_path)
    check_rows(tmp_path, parents=1)


def test_jobs_go_on_while_the_nodes_daemon_is_dead(slurm: Cluster, tmp_path: Path) -> None:
    sweep = ("-m", *SMALL, *TINY, "batch.seed=1,2,3,4", "hydra.sweep.dir=S", "format=json")
    folder = tmp_path / "S"
    process = start(tmp_path, *sweep, SLURM_CONF=slurm.conf)
    wait_until(lambda: all((folder / num / "job.json").exists() for num in "01"), 180, "two jobs")
    slurm.kill_slurmd()
    wait_until(lambda: result(folder / "0") and result(folder / "1"), 180, "two results")
    slurm.start_slurmd()
    assert process.wait(400) == 0
    jobs = json.loads((tmp_path / "stdout").read_text())["jobs"]
    assert [job["status"] for job in jobs] == ["ok"] * 4
    assert not (folder / "0" / "earlier").exists(), "none of them began anew"
    nothing_is_left(tmp_path)
    check_rows(tmp_path, parents=1)


def test_nothing_of_a_hundred_jobs_is_lost_when_slurmd_and_the_submitting_command_are_killed(
    slurm: Cluster, tmp_path: Path
) -> None:
    seeds = [*range(1, 21), fate.KILLED, fate.RAISE, 31, 32, 33]
    known = ",".join(map(str, seeds[:20]))
    tiny = (*TINY, "plan.headroom=0.9")  # a batch of 2^20 rows fits no machine then
    before = run(tmp_path, "-m", *tiny, f"batch.seed={known}", "batch.batch_size=1,2")
    assert before.returncode == 0, before.stderr
    sweep = (
        "-m", *FOUR, *tiny, f"batch.seed={','.join(map(str, reversed(seeds)))}",
        "batch.batch_size=1,2,1048576,2000000000", "hydra.sweep.dir=S", "format=json",
    )  # fmt: skip
    folder = tmp_path / "S"
    process = start(tmp_path, *sweep, misbehaving=True, SLURM_CONF=slurm.conf)
    wait_until(lambda: len(list(folder.glob("*/re*.json"))) >= 15, 400, "fifteen results")
    slurm.kill_slurmd()
    time.sleep(5)
    slurm.start_slurmd()
    wait_until(lambda: len(list(folder.glob("*/re*.json"))) >= 30, 400, "thirty results")
    process.send_signal(signal.SIGKILL)
    process.wait(30)
    refused = run(tmp_path, *sweep, SLURM_CONF=slurm.conf)
    assert refused.returncode == 2
    assert "still in Slurm's queue" in document(refused)["problems"][0]
    slurm("scancel", slurm.array(folder))
    slurm.wait_until_empty(120)
    done = run(tmp_path, *sweep, SLURM_CONF=slurm.conf)
    assert done.returncode == 1, done.stderr
    jobs = document(done)["jobs"]
    assert [job["num"] for job in jobs] == list(range(100))
    assert Counter(job["status"] for job in jobs) == {"ok": 50, "does_not_fit": 25, "refused": 25}
    assert sum(job.get("reused", False) for job in jobs if job["status"] == "ok") >= 40
    nothing_is_left(tmp_path)
    check_rows(tmp_path, parents=3)
