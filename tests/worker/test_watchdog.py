"""A worker in which nothing moves any more ends as `timeout`, with the stack of its wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.running import results
from zinfer.job.events import EventLog
from zinfer.worker.watchdog import Signs, moved, signs, stalls

STILL = Signs(steps=10, block_bytes=1000, cpu_s=5.0)


@pytest.mark.parametrize(
    ("now", "has_moved"),
    [
        (STILL, False),
        (Signs(steps=10, block_bytes=1000, cpu_s=5.1), False),  # watching costs a little
        (Signs(steps=11, block_bytes=1000, cpu_s=5.0), True),
        (Signs(steps=10, block_bytes=1512, cpu_s=5.0), True),
        (Signs(steps=10, block_bytes=1000, cpu_s=9.0), True),  # it computes
    ],
)
def test_steps_bytes_and_processor_time_are_signs_of_life(now: Signs, has_moved: bool) -> None:
    assert moved(STILL, now, seconds=10.0) == has_moved


def test_it_waits_for_whom_moves_and_not_for_whom_stands() -> None:
    def reads() -> Iterator[Signs]:
        for number in range(5):
            yield Signs(steps=0, block_bytes=number, cpu_s=0.0)
        while True:
            yield Signs(steps=0, block_bytes=4, cpu_s=0.0)

    looks, seen = reads(), []

    def look() -> Signs:
        seen.append(next(looks))
        return seen[-1]

    assert stalls(look, 0.1, threading.Event(), 0.02)
    assert len(seen) >= 5 + 5
    over = threading.Event()
    over.set()
    assert not stalls(lambda: STILL, 0.1, over, 0.02)


def test_this_process_gives_signs(tmp_path: Path) -> None:
    events = EventLog(tmp_path)
    before = signs(events)
    events.phase("generate")
    now = signs(events)
    assert now.steps == before.steps + 1 and now.cpu_s > 0
    assert moved(before, now, seconds=1.0)


@pytest.mark.slow
def test_a_run_that_waits_for_ever_ends_as_timeout_with_its_stack(
    built_ops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """batch.seed=107 of tests/misbehaving: after its first sample the worker only sleeps."""
    root = Path(__file__).parents[2]
    monkeypatch.setenv("PYTHONPATH", f"{root / 'tests' / 'misbehaving'}:{root}")
    (job,) = results(
        tmp_path / "jobs",
        "model=tiny-llama",
        "offload=nvme",
        "batch.seed=107",
        "launcher.stall_s=5",
        "launcher.timeout_s=200",
        "launcher.fork_workers=false",
        "tracking=none",
    )
    assert job["status"] == "timeout"
    assert "nothing moved for launcher.stall_s=5" in job["reason"]
    assert "in misbehave" in job["reason"]
