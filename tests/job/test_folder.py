"""Every use of a job folder is an attempt of its own, and only one process uses it at a time."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from tests.helpers.sweeping import environment
from zinfer.job.events import EventLog, EventReader, parsed_event
from zinfer.job.folder import (
    FolderInUse,
    abandoned_folders,
    attempt_folder,
    attempt_in,
    begin_attempt,
    is_driven,
    other_jobs_at_work,
    read_job,
    write_job,
)
from zinfer.job.records import read_result

HOLD = """
import sys, time
from pathlib import Path
from zinfer.job.folder import attempt_in
with attempt_in(Path(sys.argv[1])):
    print(1, flush=True)
    time.sleep(60)
"""


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))


def holder(folder: Path) -> subprocess.Popen[bytes]:
    """Start another process that works on this folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(folder)], stdout=subprocess.PIPE, env=environment()
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def test_what_an_earlier_attempt_left_is_moved_and_what_others_left_is_not(tmp_path: Path) -> None:
    with attempt_in(tmp_path) as first:
        write_job(tmp_path, composed("model=tiny-llama"), first)
        for name in ("events.jsonl", "events.rank1.jsonl", "result.json", "worker.log"):
            (tmp_path / name).write_text("old")
        (tmp_path / "mine.txt").write_text("of the user")
    with attempt_in(tmp_path) as second:
        left = {path.name for path in tmp_path.iterdir()}
    assert first != second
    assert left - {"cache", ".driver.lock"} == {"earlier", "mine.txt"}
    moved = {path.name for path in (tmp_path / "earlier" / "1").iterdir()}
    assert moved == {"events.jsonl", "events.rank1.jsonl", "result.json", "worker.log", "job.json"}
    assert attempt_folder(tmp_path, first) == tmp_path / "earlier" / "1"
    assert attempt_folder(tmp_path, second) is None


def test_an_attempt_inside_an_attempt_of_the_same_folder_is_the_same(tmp_path: Path) -> None:
    with attempt_in(tmp_path) as outer, attempt_in(tmp_path) as inner:
        assert outer == inner
    assert not (tmp_path / "earlier").exists()


def test_a_sweeps_folder_gives_up_its_jobs_and_nothing_else(tmp_path: Path) -> None:
    for name, record in (("0", "result.json"), ("1", "reused.json"), ("a=1,b=2", "job.json")):
        (tmp_path / name).mkdir()
        (tmp_path / name / record).write_text("{}")
    (tmp_path / "7").mkdir()
    (tmp_path / "7" / "thesis.tex").write_text("of the user")
    for name in ("sweep.json", "stop.json", "parent_run.json"):
        (tmp_path / name).write_text("{}")
    begin_attempt(tmp_path, "sweep")
    assert {path.name for path in tmp_path.iterdir()} == {"earlier", "7"}
    moved = {path.name for path in (tmp_path / "earlier" / "1").iterdir()}
    assert moved == {"0", "1", "a=1,b=2", "sweep.json", "stop.json", "parent_run.json"}


def test_two_processes_cannot_use_one_folder(tmp_path: Path) -> None:
    with holder(tmp_path / "job") as other:
        with pytest.raises(FolderInUse, match=r"in use by another zinfer.*hydra\.run\.dir"):
            attempt_in(tmp_path / "job").__enter__()
        assert is_driven(tmp_path / "job")
        assert abandoned_folders() == []
        other.kill()
    assert not is_driven(tmp_path / "job")
    assert abandoned_folders() == [(tmp_path / "job", "job")]


def test_an_attempt_whose_driver_was_killed_is_still_found_when_its_folder_is_used_again(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "job"
    with holder(folder) as other:
        write_job(folder, composed("model=tiny-llama"), "0123")
        other.kill()
    with attempt_in(folder):
        assert abandoned_folders() == [(folder / "earlier" / "1", "job")]
    assert abandoned_folders() == [(folder / "earlier" / "1", "job")]
    job = read_job(folder / "earlier" / "1")
    assert job is not None and job.attempt == "0123"


def test_a_killed_job_of_a_sweep_is_found_where_the_next_sweep_has_moved_it(
    tmp_path: Path,
) -> None:
    folder = tmp_path / "sweep" / "0"
    with holder(folder) as other:
        write_job(folder, composed("model=tiny-llama"), "0123")
        other.kill()
    with attempt_in(tmp_path / "sweep", "sweep"):
        assert abandoned_folders() == [(tmp_path / "sweep" / "earlier" / "1" / "0", "job")]


def test_other_jobs_at_work_are_those_with_a_worker_and_a_living_driver(tmp_path: Path) -> None:
    with holder(tmp_path / "planned") as planned, holder(tmp_path / "other") as other:
        assert other_jobs_at_work("mine") == 0  # neither has a worker yet
        write_job(tmp_path / "other", composed("model=tiny-llama"), "0123")
        assert other_jobs_at_work("mine") == 1
        assert other_jobs_at_work("0123") == 0
        other.kill()
        other.wait()
        assert other_jobs_at_work("mine") == 0
        planned.kill()


def test_a_job_record_is_for_its_owner_alone(tmp_path: Path) -> None:
    write_job(tmp_path, composed("model=tiny-llama"), "0123")
    assert (tmp_path / "job.json").stat().st_mode & 0o077 == 0


def test_events_of_another_attempt_are_left_out(tmp_path: Path) -> None:
    EventLog(tmp_path, attempt="old").phase("load")
    EventLog(tmp_path, attempt="new").phase("plan")
    names = [event["name"] for event in EventReader(tmp_path, "new").new_events()]
    assert names == ["plan"]


def test_events_are_read_although_the_folder_is_deleted_meanwhile(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    log = EventLog(tmp_path / "job")
    log.phase("plan")
    reader = EventReader(tmp_path / "job")
    assert len(list(reader.new_events())) == 1
    (tmp_path / "job" / "events.jsonl").unlink()
    log.phase("load")
    assert [event["name"] for event in reader.new_events()] == ["load"]


GOOD = {"time_s": 1.0, "attempt": "a", "event": "result", "status": "ok", "metrics": {"x_s": 1}}


@pytest.mark.parametrize(
    "changed",
    [
        {"status": "wonderful"},
        {"metrics": {"x_s": "fast"}},
        {"metrics": [1]},
        {"attempt": 3},
        {"time_s": "noon"},
        {"event": "phase", "name": 3},
        {"event": "sample", "kind": "timed"},
        {"event": "failed", "status": "error", "reason": None, "problems": []},
    ],
)
def test_a_line_that_is_no_event_is_left_out(changed: dict[str, object]) -> None:
    assert parsed_event(json.dumps(GOOD).encode()) == GOOD
    assert parsed_event(json.dumps({**GOOD, **changed}).encode()) is None


@pytest.mark.parametrize("line", [b"", b"[1]", b"{", b'"text"', b"\xff\xfe", b"null"])
def test_noise_is_no_event(line: bytes) -> None:
    assert parsed_event(line) is None


@pytest.mark.parametrize(
    "text",
    ["", "[]", "3", '{"status": "great"}', '{"status": "ok", "metrics": {"a": "b"}}',
     '{"status": "ok", "run_id": 7}', '{"status": "killed", "ended_by": "me"}'],
)  # fmt: skip
def test_a_file_that_is_no_result_is_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "result.json").write_text(text)
    assert read_result(tmp_path / "result.json") is None


@pytest.mark.parametrize("cache", ["/proc/none", "{}/file", "{}/file/below"])
def test_a_job_needs_no_cache_folder(
    cache: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("ZINFER_CACHE", cache.format(tmp_path))
    for _ in range(2):
        with attempt_in(tmp_path / "job"):
            (tmp_path / "job" / "events.jsonl").touch()
    assert abandoned_folders() == []
    assert (tmp_path / "job" / "earlier" / "1" / "events.jsonl").exists()
