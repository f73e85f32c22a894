"""Read a store whose writer was killed in the middle of a transaction."""

from __future__ import annotations

import signal
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path
from urllib.parse import quote

import pytest

from multirun_analysis.queries import run_count
from zinfer.sweep.earlier_runs import STATUS_TAG, ended_runs, runs_of_newest_sweep
from zinfer.tracking.names import KEY_TAG, ROLE_TAG
from zinfer.tracking.parent import JOBS_TAG
from zinfer.tracking.reading import open_to_read
from zinfer.tracking.store import ensure_store
from zinfer.tracking.uri import sqlite_uri

RUNS = ("a", "b", "c")
WRITER = """
import sqlite3, sys, time
store = sqlite3.connect(sys.argv[1])
store.execute("PRAGMA cache_size = 1")  # changed pages go to the file before the commit
store.execute("DELETE FROM tags")
store.execute("DELETE FROM runs")
for number in range(2000):
    store.execute("INSERT INTO tags VALUES (?, ?, ?)", (str(number), "x" * 500, "a"))
print("half done", flush=True)
time.sleep(600)
"""
"""Deletes every run, and is killed before it says that this is meant."""


@pytest.fixture
def killed(tmp_path: Path) -> Path:
    """Return a store of three ended runs, one of them a sweep, and a writer's hot journal."""
    path = tmp_path / "an odd%20name?.db"
    ensure_store(sqlite_uri(path))
    with sqlite3.connect(path) as store:
        store.execute("INSERT INTO experiments (experiment_id, name) VALUES (7, 'mine')")
        for number, run_id in enumerate(RUNS):
            store.execute(
                "INSERT INTO runs (run_uuid, experiment_id, status, lifecycle_stage, start_time,"
                " end_time) VALUES (?, 7, 'FINISHED', 'active', ?, ?)",
                (run_id, number, number),
            )
            job = {ROLE_TAG: "job", KEY_TAG: run_id * 3, STATUS_TAG: "ok"}
            sweep = {ROLE_TAG: "sweep", JOBS_TAG: '[{"run_id": "b"}, {"run_id": "a"}]'}
            tags = sweep if run_id == "c" else job
            for key, value in tags.items():
                store.execute("INSERT INTO tags VALUES (?, ?, ?)", (key, value, run_id))
    store.close()
    process = subprocess.Popen(
        [sys.executable, "-c", WRITER, str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "half done\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    journal = path.with_name(path.name + "-journal")
    assert journal.stat().st_size > 0, "without a journal the test shows nothing"
    return path


def test_the_journal_of_a_killed_writer_stops_a_reader_that_may_not_write(killed: Path) -> None:
    uri = f"file:{quote(str(killed))}?mode=ro"
    with (
        closing(sqlite3.connect(uri, uri=True)) as store,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        store.execute("SELECT * FROM runs").fetchall()


def test_runs_are_found_after_a_writer_was_killed(killed: Path) -> None:
    found = ended_runs(sqlite_uri(killed), "mine")
    assert [(run.run_id, run.key, run.status) for run in found] == [
        ("a", "aaa", "ok"),
        ("b", "bbb", "ok"),
    ]


def test_the_newest_sweep_is_found_after_a_writer_was_killed(killed: Path) -> None:
    assert runs_of_newest_sweep(sqlite_uri(killed), "mine") == ["a", "b"]


def test_runs_are_counted_after_a_writer_was_killed(killed: Path) -> None:
    assert run_count(sqlite_uri(killed), ["7"]) == len(RUNS)


def test_a_reader_changes_nothing(killed: Path) -> None:
    with (
        open_to_read(killed) as store,
        pytest.raises(sqlite3.OperationalError, match="readonly"),
    ):
        store.execute("DELETE FROM runs")
    assert run_count(sqlite_uri(killed), ["7"]) == len(RUNS)


def test_a_missing_store_is_not_made(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    with pytest.raises(sqlite3.OperationalError), open_to_read(path):
        pass
    assert not path.exists()
