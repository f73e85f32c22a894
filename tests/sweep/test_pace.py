"""Say how far a sweep is from its jobs' files, without refused and reused ones."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from zinfer.sweep.pace import Pace
from zinfer.sweep.record import JobFolder, JobState, Sweep, SweepJob, Verdict
from zinfer.sweep.search import Quiet
from zinfer.sweep.terminal import SweepTerminal

START_S = 1_800_000_000.0


def planned(num: int, folder: Path, state: JobState = "run", verdict: Verdict = "fits") -> SweepJob:
    return SweepJob(
        num=num,
        overrides=[f"batch.batch_size={num}"],
        folder=str(folder / str(num)),
        state=state,
        verdict=verdict,
        generations=4,
        work_bytes=100.0,
    )


def sweep_of(folder: Path, jobs: list[SweepJob]) -> Sweep:
    return Sweep(
        folder=folder,
        attempt=str(folder),  # jobs of this process are kept by it
        command="zinfer -m",
        output_format="text",
        tracking_uri=None,
        experiment="zinfer",
        resumes=False,
        retry="failed",
        fail_fast=False,
        preview=False,
        local=True,
        in_process=True,
        forked=True,
        started_s=START_S,
        pid=os.getpid(),
        jobs=jobs,
    )


def ran(sweep: Sweep, num: int, first_event_s: float, end_s: float | None, **result: Any) -> None:
    """Leave what a job leaves: the note that it began, its first event, its result."""
    folder = sweep.folder / str(num)
    folder.mkdir()
    sweep.begin_job(num, folder, [], f"opt-125m batch.batch_size={num}")
    event = {"time_s": first_event_s, "attempt": "j", "event": "phase", "name": "plan"}
    (folder / "events.jsonl").write_text(json.dumps(event) + "\n")
    if end_s is not None:
        path = folder / "result.json"
        path.write_text(json.dumps({"status": "ok", "metrics": {"total_s": 1.0}, **result}))
        os.utime(path, (end_s, end_s))


def test_the_imports_that_all_jobs_wait_for_are_in_no_estimate(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [planned(num, tmp_path) for num in range(4)])
    ran(sweep, 0, START_S + 20, START_S + 30)  # 20 s of composing, planning and importing
    ran(sweep, 1, START_S + 31, START_S + 41)
    ran(sweep, 2, START_S + 42, None)
    pace = Pace(sweep)
    running = pace.look()
    assert [job.num for job in running] == [2]
    # two jobs of 10 s, one of them begun 4 s ago, and a second between two jobs
    assert pace.seconds_left(running, START_S + 46) == pytest.approx(6 + 10 + 1)
    said = pace.said(17.0, START_S + 46)
    assert said == "2 of 4 jobs done, 45 seconds so far, about 15 seconds left"


@pytest.mark.parametrize(
    ("state", "verdict"), [("reused", "unknown"), ("refused", "refused"), ("run", "does_not_fit")]
)
def test_jobs_that_do_not_run_take_no_time(
    state: JobState, verdict: Verdict, tmp_path: Path
) -> None:
    jobs = [planned(0, tmp_path), planned(1, tmp_path), planned(2, tmp_path, state, verdict)]
    sweep = sweep_of(tmp_path, jobs)
    ran(sweep, 0, START_S + 10, START_S + 40)
    pace = Pace(sweep)
    pace.look()
    assert pace.seconds_left([], START_S + 40) == pytest.approx(30)


def test_what_failed_is_counted_and_tells_nothing_of_the_others(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [planned(num, tmp_path) for num in range(3)])
    ran(sweep, 0, START_S, START_S + 600, status="timeout")
    pace = Pace(sweep)
    pace.look()
    assert pace.seconds_left([], START_S + 600) is None
    assert pace.said(None, START_S + 600) == "1 of 3 jobs done, 1 failed, 10 minutes so far"
    ran(sweep, 1, START_S + 600, START_S + 620)
    pace.look()
    assert pace.seconds_left([], START_S + 620) == pytest.approx(20)


def search_of(folder: Path, trials: int | None) -> Sweep:
    """Return a sweep whose sweeper chooses the jobs one after the other."""
    return replace(sweep_of(folder, []), jobs=None, trials=trials)


def test_a_search_is_expected_to_go_on_at_its_own_pace(tmp_path: Path) -> None:
    sweep = search_of(tmp_path, trials=10)
    ran(sweep, 0, START_S, START_S, reused=True)
    ran(sweep, 1, START_S + 20, START_S + 30)
    ran(sweep, 2, START_S + 31, START_S + 50, status="does_not_fit")
    ran(sweep, 3, START_S + 51, START_S + 80)
    ran(sweep, 4, START_S + 81, None)
    pace = Pace(sweep)
    running = pace.look()
    # three took 60 s; six are left, of which one has begun 5 s ago
    assert pace.seconds_left(running, START_S + 85) == pytest.approx(6 * 20 - 5)
    said = pace.said(115.0, START_S + 85)
    assert said == "4 of 10 jobs done, 1 failed, 1 minute so far, about 2 minutes left"


@pytest.mark.parametrize(("trials", "result"), [(None, {}), (5, {"reused": True})])
def test_a_search_without_a_number_or_a_job_of_its_own_has_no_time_left(
    trials: int | None, result: dict[str, Any], tmp_path: Path
) -> None:
    sweep = search_of(tmp_path, trials)
    ran(sweep, 0, START_S, START_S + 10, **result)
    pace = Pace(sweep)
    pace.look()
    assert pace.seconds_left([], START_S + 10) is None


def test_a_job_without_its_folder_costs_the_pace_nothing(tmp_path: Path) -> None:
    sweep = sweep_of(tmp_path, [planned(num, tmp_path) for num in range(2)])
    ran(sweep, 0, START_S, START_S + 5)
    (tmp_path / "0" / "events.jsonl").write_text("not JSON\n")
    pace = Pace(sweep)
    pace.look()
    assert pace.seconds_left([], START_S + 5) is None
    assert pace.said(None, START_S + 5).startswith("1 of 2 jobs done")


@pytest.mark.parametrize("about", [None, "a disk"])
def test_a_warning_names_the_job_that_it_is_of(
    about: str | None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    label = "opt-125m batch.batch_size=4"
    job = JobFolder(num=0, folder=tmp_path / "0", overrides=[], label=label)
    terminal = SweepTerminal(sweep_of(tmp_path, []), job)
    said = f"{tmp_path} is slow"
    terminal.warning(said, about=about and f"{about} {tmp_path}")
    terminal.event({"event": "warning", "message": said, "time_s": START_S})
    Quiet(terminal, 8).warning(said)
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {label}: {said}",
        f"warning: {label}: {said}",
        f"warning: {label} batch.batch_size=8: {said}",
    ]
