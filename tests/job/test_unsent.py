"""Runs that wait for their store are found wherever their folders are, and whatever moved them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from zinfer.job.folder import attempt_in
from zinfer.job.unsent import note_unsent, unsent


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    (tmp_path / "project").mkdir()
    monkeypatch.chdir(tmp_path / "project")


def left_in(folder: Path) -> Path:
    """Make a job folder as a run leaves it whose store did not answer."""
    folder.mkdir(parents=True)
    (folder / "not_logged.json").write_text('{"problem": "gone", "run_id": null}')
    (folder / "result.json").write_text("{}")
    note_unsent(folder)
    return folder.resolve()


def test_folders_of_the_defaults_and_fixed_ones_are_found_once_each(tmp_path: Path) -> None:
    made = [left_in(Path("outputs/day/a")), left_in(Path("multirun/day/b/0"))]
    fixed = [left_in(Path("here")), left_in(tmp_path / "disk" / "sweep" / "3")]
    found = unsent()
    assert set(found.folders) == {*made, *fixed} and len(found.folders) == 4
    assert set(found.looked_in) == {"outputs/", "multirun/", *map(str, fixed)}


def test_a_run_whose_folder_was_used_again_is_found_where_it_was_moved_to(tmp_path: Path) -> None:
    job = left_in(tmp_path / "job")
    swept = left_in(tmp_path / "sweep" / "0")
    with attempt_in(job), attempt_in(swept.parent, "sweep"):
        pass
    assert set(unsent().folders) == {job / "earlier" / "1", swept.parent / "earlier" / "1" / "0"}


def test_what_was_sent_or_deleted_is_forgotten(tmp_path: Path) -> None:
    sent, deleted = left_in(tmp_path / "sent"), left_in(tmp_path / "deleted")
    (sent / "not_logged.json").unlink()
    shutil.rmtree(deleted)
    assert unsent().folders == ()
    assert list((tmp_path / "cache" / "unsent").iterdir()) == []


def test_a_folder_of_another_host_that_is_not_seen_here_stays_noted(tmp_path: Path) -> None:
    shutil.rmtree(left_in(tmp_path / "job"))
    (note,) = (tmp_path / "cache" / "unsent").iterdir()
    note.write_text(json.dumps({**json.loads(note.read_text()), "host": "elsewhere"}))
    assert unsent().folders == () and note.exists()


def test_runs_of_another_working_directory_are_named_and_not_sent(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    left_in(tmp_path / "disk" / "job")
    (tmp_path / "other").mkdir()
    monkeypatch.chdir(tmp_path / "other")
    found = unsent()
    assert found.folders == () and found.elsewhere == (str(tmp_path / "project"),)


@pytest.mark.parametrize("note", ["", "[]", '{"folder": 3}', '{"folder": "/", "host": "x"}'])
def test_a_note_that_is_none_is_left_out(note: str, tmp_path: Path) -> None:
    (tmp_path / "cache" / "unsent").mkdir(parents=True)
    (tmp_path / "cache" / "unsent" / "x.json").write_text(note)
    assert unsent().folders == ()
