"""The store under load and out of reach: nothing that was measured is lost."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    job_runs,
    nothing_is_left,
    run,
    runs,
    start,
    statuses,
)

pytestmark = pytest.mark.slow


def test_four_sweeps_at_once_on_one_new_store_lose_nothing(tmp_path: Path) -> None:
    store = f"tracking.uri=sqlite:///{tmp_path}/mlflow.db"
    sweeps = []
    for index in range(4):
        folder = tmp_path / f"sweep{index}"
        folder.mkdir()
        sweeps.append(
            start(folder, "-m", *TINY, store, f"batch.seed={2 * index + 1},{2 * index + 2}")
        )
    assert [sweep.wait(240) for sweep in sweeps] == [0] * 4, [
        (tmp_path / f"sweep{index}/stderr").read_text() for index in range(4)
    ]
    logged = job_runs(tmp_path)
    assert [found["mlflow"] for found in logged] == ["FINISHED"] * 8
    assert len({found["zinfer.config_key"] for found in logged}) == 8
    assert all(found["repeats"] == 2 for found in logged)
    parents = [found for found in runs(tmp_path) if found["role"] == "sweep"]
    assert sorted(found["mlflow.parentRunId"] for found in logged) == sorted(
        2 * [parent["run_id"] for parent in parents]
    )
    assert not list(tmp_path.glob("sweep*/multirun/*/*/*/not_logged.json"))


def test_runs_whose_store_was_out_of_reach_are_sent_later(tmp_path: Path) -> None:
    done = run(
        tmp_path,
        "-m",
        *TINY,
        "tracking=server",
        "tracking.uri=http://127.0.0.1:9",
        "batch.seed=1,2",
        "format=json",
    )
    assert statuses(done) == ["ok", "ok"]
    assert done.returncode == 0
    assert "zinfer task=upload" in done.stderr
    assert not (tmp_path / "mlflow.db").exists()
    sent = run(tmp_path, "task=upload", "format=json")
    assert sent.returncode == 0, sent.stderr
    assert "2 of 2 runs sent" in document(sent)["reason"]
    assert [(found["mlflow"], found["repeats"]) for found in job_runs(tmp_path)] == [
        ("FINISHED", 2)
    ] * 2
    again = run(tmp_path, "task=upload", "format=json")
    assert "0 of 0 runs sent" in document(again)["reason"]
    nothing_is_left(tmp_path)
    resumed = run(
        tmp_path, "-m", *TINY, "batch.seed=1,2", "format=json"
    )  # in the store that they are in now
    assert [job.get("reused") for job in document(resumed)["jobs"]] == [True, True]


def postgres_folder() -> Path | None:
    """Find PostgreSQL's initdb and postgres."""
    versions = sorted(
        Path("/usr/lib/postgresql").glob("*/bin/initdb")
    )  # Debian keeps them off the PATH
    found = versions[-1] if versions else shutil.which("initdb")
    return Path(found).resolve().parent if found else None


def has_psycopg2() -> bool:
    return (
        subprocess.run(
            [sys.executable, "-c", "import psycopg2"], capture_output=True, check=False
        ).returncode
        == 0
    )


@pytest.fixture
def postgres(tmp_path: Path) -> Iterator[str]:
    """Start a PostgreSQL server of this test's own; return its URI."""
    programs = postgres_folder()
    if programs is None:
        pytest.skip("needs PostgreSQL: apt-get install postgresql")
    if not has_psycopg2():
        pytest.skip("needs pip install psycopg2-binary")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    data = tmp_path / "postgres"
    data.mkdir()
    as_owner: list[str] = []
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        shutil.chown(data, "postgres")
        tmp_path.chmod(0o755)
        for parent in list(tmp_path.parents)[:3]:
            if parent != Path("/tmp"):
                parent.chmod(0o755)
        as_owner = ["runuser", "-u", "postgres", "--"]
    subprocess.run(
        [*as_owner, programs / "initdb", "-D", data, "-A", "trust", "-U", "zinfer"],
        check=True,
        capture_output=True,
        cwd="/",
    )
    command = [
        *as_owner,
        programs / "postgres",
        "-D",
        data,
        "-p",
        str(port),
        "-k",
        data,
        "-c",
        "listen_addresses=127.0.0.1",
    ]
    server = subprocess.Popen(
        command, cwd="/", stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    deadline_s = time.monotonic() + 30
    ready = [programs / "pg_isready", "-h", "127.0.0.1", "-p", str(port)]
    while subprocess.run(ready, capture_output=True, check=False).returncode:
        assert time.monotonic() < deadline_s, "PostgreSQL did not start"
        time.sleep(0.2)
    yield f"postgresql+psycopg2://zinfer@127.0.0.1:{port}/postgres"
    server.terminate()
    server.wait(30)


def test_two_sweeps_at_once_on_postgresql_and_their_resume(postgres: str, tmp_path: Path) -> None:
    store = ("tracking=server", f"tracking.uri={postgres}", "format=json")
    sweeps = []
    for index in range(2):
        folder = tmp_path / f"sweep{index}"
        folder.mkdir()
        sweeps.append(
            start(folder, "-m", *TINY, *store, f"batch.seed={2 * index + 1},{2 * index + 2}")
        )
    assert [sweep.wait(240) for sweep in sweeps] == [0, 0], [
        (tmp_path / f"sweep{index}/stderr").read_text() for index in range(2)
    ]
    ids = [
        job["run_id"]
        for index in range(2)
        for job in json.loads((tmp_path / f"sweep{index}/stdout").read_text())["jobs"]
    ]
    assert len(set(ids)) == 4 and None not in ids
    again = run(tmp_path, "-m", *TINY, *store, "batch.seed=1,2,3,4")
    assert [(job["reused"], job["run_id"]) for job in document(again)["jobs"]] == [
        (True, run_id) for run_id in ids
    ]
