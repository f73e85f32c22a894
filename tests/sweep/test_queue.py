"""The end of a sweep waits for the jobs that a batch system still has."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sweeping import wait_until
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal
from zinfer.sweep import queue as queue_module
from zinfer.sweep.queue import Queue, queue_of, still_queued, wait_for_queue

SLURM = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"
LOCAL = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.LocalLauncher"


@pytest.fixture
def commands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a folder in front of PATH, for commands of Slurm that answer as a test needs them."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")
    return folder


def answering(commands: Path, name: str, script: str) -> None:
    path = commands / name
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(0o755)


def submitted(folder: Path, *jobs: str) -> None:
    for job in jobs:
        (folder / job).mkdir(parents=True)
        (folder / job / f"{job}_submitted.pkl").touch()


@pytest.mark.parametrize(
    ("launcher", "folder", "expected"),
    [
        (SLURM, "/s/.submitit/%j", Queue(system="slurm", folder="/s/.submitit")),
        (LOCAL, "/s/.submitit/%j", Queue(system="local", folder="/s/.submitit")),
        (SLURM, None, None),
        ("hydra_plugins.hydra_joblib_launcher.joblib_launcher.JoblibLauncher", "/s/%j", None),
    ],
)
def test_only_submitit_s_launchers_have_a_queue(
    launcher: str, folder: str | None, expected: Queue | None
) -> None:
    assert queue_of(launcher, folder) == expected


@pytest.mark.parametrize(
    ("script", "left"),
    [
        ("echo 7_0; echo 7_4", ["7_0", "7_4"]),
        ("true", []),
        ("echo 'slurm_load_jobs error: Invalid job id specified' >&2; exit 1", []),
        ("echo 'Unable to contact slurm controller' >&2; exit 1", None),
    ],
)
def test_what_squeue_says_is_what_is_left(
    script: str, left: list[str] | None, commands: Path, tmp_path: Path
) -> None:
    answering(commands, "squeue", f'echo "$@" > {tmp_path}/asked; {script}')
    submitted(tmp_path / "jobs", "7_0", "7_4", "9")
    assert Queue(system="slurm", folder=str(tmp_path / "jobs")).left() == left
    assert "--jobs=7,9" in (tmp_path / "asked").read_text()


def test_a_process_is_left_only_if_it_works_for_the_folder(tmp_path: Path) -> None:
    folder = tmp_path / "jobs"
    waits = "import sys; sys.stdin.read()"
    with subprocess.Popen(
        [sys.executable, "-c", waits, str(folder)], stdin=subprocess.PIPE
    ) as process:
        submitted(folder, str(process.pid), str(os.getpid()), "99999999")
        queue = Queue(system="local", folder=str(folder))
        wait_until(lambda: queue.left() == [str(process.pid)], 30, "process in the queue")
        assert f"kill {process.pid}" in str(still_queued(queue))
        process.communicate()
    assert queue.left() == []
    assert still_queued(queue) is None


def test_the_wait_goes_on_while_the_controller_is_away_and_ends_with_the_queue(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(queue_module, "POLL_S", 0.0)
    count = f"n=$(cat {tmp_path}/n 2>/dev/null || echo 0); echo $((n + 1)) > {tmp_path}/n"
    answer = "case $n in 0|2) exit 1;; 1|3) echo 7_0;; *) ;; esac"
    answering(commands, "squeue", f"{count}; {answer}")
    submitted(tmp_path / "jobs", "7_0")
    wait_for_queue(Queue(system="slurm", folder=str(tmp_path / "jobs")), Terminal("text"))
    assert (tmp_path / "n").read_text() == "5\n"
    assert "1 of its jobs is still in Slurm's queue" in capsys.readouterr().err


def test_a_controller_that_stays_away_is_given_up_with_a_warning(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr(queue_module, "POLL_S", 0.0)
    monkeypatch.setattr(queue_module, "SILENCE_S", 0.0)
    answering(commands, "squeue", "exit 1")
    submitted(tmp_path / "jobs", "7_0")
    wait_for_queue(Queue(system="slurm", folder=str(tmp_path / "jobs")), Terminal("text"))
    assert "squeue --jobs=7" in capsys.readouterr().err


def test_ctrl_c_ends_the_wait(
    commands: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Interrupts, "received", True)
    answering(commands, "squeue", "echo 7_0")
    answering(commands, "scancel", f'echo "$@" > {tmp_path}/cancelled')
    submitted(tmp_path / "jobs", "7_0", "7_1")
    queue = Queue(system="slurm", folder=str(tmp_path / "jobs"))
    wait_for_queue(queue, Terminal("text"))
    queue.cancel_waiting()
    assert (tmp_path / "cancelled").read_text() == "--quiet --state=PENDING 7\n"
