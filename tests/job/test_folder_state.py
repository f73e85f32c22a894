"""A job's folder is deleted, replaced, full or read-only: it is said, and no event is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sweeping import environment
from zinfer.job.events import EventLog, EventReader
from zinfer.job.folder import attempt_in, end_of
from zinfer.job.folder_state import FolderState
from zinfer.job.records import write_json


def names(reader: EventReader) -> list[str]:
    """Return the names of the phases that are new."""
    return [event["name"] for event in reader.new_events()]


def test_a_folder_that_nobody_touched_is_there_and_keeps_no_trace_of_the_look(
    tmp_path: Path,
) -> None:
    with attempt_in(tmp_path / "job"):
        before = sorted(os.listdir(tmp_path / "job"))
        assert end_of(tmp_path / "job").state is FolderState.THERE
        assert end_of(tmp_path / "job").problem is None
        assert sorted(os.listdir(tmp_path / "job")) == before


@pytest.mark.parametrize("put_there", ["nothing", "a folder", "a file"])
def test_a_folder_that_was_deleted_or_replaced_is_told_from_the_first_one(
    put_there: str, tmp_path: Path
) -> None:
    job = tmp_path / "job"
    with attempt_in(job):
        for path in job.iterdir():
            path.unlink()
        job.rmdir()
        if put_there == "a folder":
            job.mkdir()
        if put_there == "a file":
            job.write_text("")
        found = end_of(job)
    gone = put_there == "nothing"
    assert found.state is (FolderState.GONE if gone else FolderState.REPLACED)
    assert found.problem is not None and str(job) in found.problem
    assert "run the job again" in found.problem


FULL = """
import subprocess, sys
from pathlib import Path
from zinfer.job.folder import attempt_in, end_of
from zinfer.job.records import write_json
job = Path(sys.argv[1])
job.mkdir()
subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", job], check=True)
with attempt_in(job):
    if sys.argv[2] == "full":
        try:
            (job / "ballast").write_bytes(bytes(1 << 20))
        except OSError:
            pass
    else:
        subprocess.run(["mount", "--bind", job, job], check=True)
        subprocess.run(["mount", "-o", "remount,bind,ro", job], check=True)
    print(end_of(job).state.value, end_of(job).problem)
    try:
        write_json(job / "result.json", {"a": "b" * 100_000})
    except OSError as error:
        print(sorted(path.name for path in job.glob("*.json*")), error.strerror)
"""


@pytest.mark.parametrize(
    ("fault", "words"),
    [
        ("full", "full the disk of the job's folder"),
        ("read-only", "unwritable nothing can be written to the job's folder"),
    ],
)
def test_a_full_and_a_read_only_disk_are_named_and_keep_no_half_file(
    fault: str, words: str, tmp_path: Path
) -> None:
    private = ["unshare", "--mount"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs to be root, to mount a small disk of its own")
    command = [*private, sys.executable, "-c", FULL, str(tmp_path / "job"), fault]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, check=True)
    state, half_files = done.stdout.splitlines()
    assert state.startswith(words) and "set hydra.run.dir" in state, done.stderr
    assert half_files.startswith("[]"), half_files


def test_a_record_that_cannot_be_written_leaves_no_half_file(tmp_path: Path) -> None:
    (tmp_path / "result.json").mkdir()  # os.replace cannot take its place
    with pytest.raises(OSError):
        write_json(tmp_path / "result.json", {})
    assert [path.name for path in tmp_path.iterdir()] == ["result.json"]


def test_events_written_before_the_first_look_are_read_from_a_deleted_folder(
    tmp_path: Path,
) -> None:
    reader = EventReader.made(tmp_path, "")
    log = EventLog(tmp_path)
    log.phase("plan")
    (tmp_path / "events.jsonl").unlink()
    log.phase("load")
    assert names(reader) == ["plan", "load"]


@pytest.mark.parametrize("left", [0, 10])
def test_events_after_the_file_was_cut_short_are_read(left: int, tmp_path: Path) -> None:
    reader = EventReader.made(tmp_path, "")
    log = EventLog(tmp_path)
    log.phase("plan")
    log.phase("load")
    assert names(reader) == ["plan", "load"]
    os.truncate(tmp_path / "events.jsonl", left)
    log.phase("generate")
    log.phase("report")
    assert names(reader)[-1:] == ["report"]


def test_a_file_that_an_editor_wrote_anew_repeats_no_event_and_loses_none(tmp_path: Path) -> None:
    reader = EventReader.made(tmp_path, "")
    log = EventLog(tmp_path)
    log.phase("plan")
    assert names(reader) == ["plan"]
    copy = tmp_path / "copy"
    copy.write_bytes((tmp_path / "events.jsonl").read_bytes())
    os.replace(copy, tmp_path / "events.jsonl")
    log.phase("load")  # into the file that has no name any more
    EventLog(tmp_path).phase("generate")  # another rank of the driver's luck: the new file
    assert sorted(names(reader)) == ["generate", "load"]
