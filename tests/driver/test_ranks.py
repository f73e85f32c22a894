"""Several ranks and nodes say what one rank says; a dead rank ends the job with its reason."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    files_named,
    nothing_is_left,
    processes,
    run,
    start,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate
from zinfer.driver.workers import free_port

pytestmark = pytest.mark.slow

BATCH = ("batch.batch_size=4", "format=json")


def token_ids(job: dict[str, Any]) -> list[list[int]]:
    rows: list[list[int]] = job["generated"]["token_ids"]
    return rows


def test_two_ranks_say_what_one_says_and_report_memory_of_each_and_of_all(
    tmp_path: Path, built_ops: list[str]
) -> None:
    done = run(tmp_path, "-m", *TINY, *BATCH, "launcher.ranks=1,2", "offload=cpu,nvme")
    assert done.returncode == 0, done.stderr
    jobs = document(done)["jobs"]
    assert len({str(token_ids(job)) for job in jobs}) == 1
    assert len(token_ids(jobs[0])) == 4
    for job in jobs[2:]:
        metrics = job["metrics"]
        each = [metrics[f"rank{rank}_peak_host_rss_bytes"] for rank in (0, 1)]
        assert sum(each) == metrics["peak_host_rss_bytes"]
    assert len({job["run_id"] for job in jobs}) == 4
    nothing_is_left(tmp_path)


@pytest.mark.parametrize(
    ("seed", "status", "words"),
    [(fate.KILLED, "killed", "rank 1 was ended by SIGKILL"), (fate.RAISE, "error", "unlucky")],
)
def test_a_rank_that_dies_ends_the_job_with_its_reason(
    seed: int, status: str, words: str, tmp_path: Path
) -> None:
    done = run(
        tmp_path,
        *TINY,
        *BATCH,
        "launcher.ranks=2",
        f"batch.seed={seed}",
        misbehaving=True,
        MISBEHAVING_RANK="1",
    )
    assert done.returncode == 1
    assert document(done)["status"] == status
    assert words in document(done)["reason"]
    nothing_is_left(tmp_path)


def test_two_nodes_meet_and_say_what_one_process_says(tmp_path: Path, built_ops: list[str]) -> None:
    """Two drivers of one rank each, as on two hosts; each with a folder and a store of its own."""
    meet = ("launcher.nodes=2", f"launcher.rendezvous=127.0.0.1:{free_port()}")
    folders = [tmp_path / name for name in ("node0", "node1", "alone")]
    for folder in folders:
        folder.mkdir()
    second = start(folders[1], *TINY, *BATCH, *meet, "launcher.node_rank=1", "tracking=none")
    first = run(folders[0], *TINY, *BATCH, *meet, "launcher.node_rank=0")
    assert second.wait(300) == 0
    assert first.returncode == 0, first.stderr
    alone = run(folders[2], *TINY, *BATCH)
    assert token_ids(document(first)) == token_ids(document(alone))
    assert "results are with node 0" in (folders[1] / "stdout").read_text()
    nothing_is_left(folders[0])


def test_a_node_that_is_killed_ends_the_other(tmp_path: Path) -> None:
    meet = (
        "launcher.nodes=2",
        f"launcher.rendezvous=127.0.0.1:{free_port()}",
        f"batch.seed={fate.SLEEP}",
    )
    folders = [tmp_path / name for name in ("node0", "node1")]
    nodes = []
    for rank, folder in enumerate(folders):
        folder.mkdir()
        nodes.append(
            start(
                folder,
                *TINY,
                *BATCH,
                *meet,
                f"launcher.node_rank={rank}",
                misbehaving=True,
                MISBEHAVING_RANK="1",
            )
        )
    wait_until(
        lambda: any(
            '"generate"' in path.read_text() for path in files_named(folders[0], "events.jsonl")
        ),
        90,
        "generation",
    )
    nodes[1].send_signal(signal.SIGKILL)
    assert nodes[0].wait(300) == 1
    wait_until(lambda: not processes(tmp_path), 60, "end of both")


def test_only_visible_gpus_are_used(tmp_path: Path) -> None:
    """An empty CUDA_VISIBLE_DEVICES leads to the CPU on any machine."""
    done = run(
        tmp_path,
        *TINY[:3],
        "hardware.accelerator=auto",
        "task=plan",
        "format=json",
        CUDA_VISIBLE_DEVICES="",
    )
    assert done.returncode == 0
    assert document(done)["plan"]["tiers"]["device"]["available_bytes"] is None  # host memory
