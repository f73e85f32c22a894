"""Time left of a sweep: from jobs that are like those to come, never from the others."""

from __future__ import annotations

import pytest

from zinfer.sweep.time_left import JobSize, TimedJob, expected_s, seconds_left


def size(work: float, task: str = "run") -> JobSize:
    return JobSize(task=task, work_bytes=work)


def predicted(seconds: float) -> JobSize:
    return JobSize(task="run", predicted_s=seconds, work_bytes=1.0)


def timed(of: JobSize, seconds: float, generation_s: float = 0.0) -> TimedJob:
    return TimedJob(size=of, seconds=seconds, generation_s=generation_s)


@pytest.mark.parametrize(
    ("job", "done", "expected"),
    [
        (size(1), [], None),
        (size(1), [timed(size(1), 20)], 20),
        (size(1), [timed(size(1), 20), timed(size(1), 30), timed(size(1), 100)], 30),
        (size(1), [timed(size(1, "plan"), 1)], None),
        (size(1, "plan"), [timed(size(1, "plan"), 1), timed(size(1), 60)], 1),
        # loading takes as long, and the generations scale
        (size(2), [timed(size(1), 30, 10)], 40),
        (size(16), [timed(size(1), 30, 10)], 180),
        # of jobs that are far apart in size, the nearest tells
        (size(100), [timed(size(1), 12, 2), timed(size(64), 130, 120)], 197.5),
        (size(1), [timed(size(1), 12, 2), timed(size(64), 130, 120)], 12),
        # a prediction knows better than the bytes of the weights
        (predicted(80), [timed(predicted(40), 50, 40)], 90),
        # nobody knows how large it is
        (JobSize(task="run"), [timed(size(1), 20, 5)], 20),
    ],
)
def test_a_job_is_expected_to_take_what_like_jobs_took(
    job: JobSize, done: list[TimedJob], expected: float | None
) -> None:
    assert expected_s(job, done) == expected


@pytest.mark.parametrize(
    ("waiting", "running", "gap_s", "left"),
    [
        ([], [], 0.0, 0.0),
        ([size(1)] * 3, [], 0.0, 60.0),
        ([size(1)] * 3, [], 1.5, 64.5),
        ([size(1)] * 3, [(size(1), 15.0)], 0.0, 65.0),
        ([size(1)] * 3, [(size(1), 50.0)], 0.0, 60.0),  # it takes longer than expected
        ([size(1)] * 4, [(size(1), 10.0), (size(1), 10.0)], 0.0, 50.0),  # two at a time
        ([], [(size(1), 0.0), (size(1), 20.0)], 0.0, 20.0),
        ([size(1), size(1, "plan")], [], 0.0, None),  # no plan has ended yet
        ([], [(size(1, "plan"), 1.0)], 0.0, None),
    ],
)
def test_the_time_left_of_a_sweep_counts_what_waits_and_what_runs(
    waiting: list[JobSize],
    running: list[tuple[JobSize, float]],
    gap_s: float,
    left: float | None,
) -> None:
    done = [timed(size(1), 20.0)]
    assert seconds_left(waiting, done, running=running, gap_s=gap_s) == left
