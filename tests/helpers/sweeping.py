"""Sweeps in processes of their own, and what they leave behind."""

from __future__ import annotations

import json
import os
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

PACKAGE = Path(__file__).parents[2]
MISBEHAVING = str(Path(__file__).parents[1] / "misbehaving")
TINY = (
    "model=tiny-llama", "dtype=float32", "launcher.omp_threads=1", "hardware.accelerator=cpu",
    "batch.prompt_tokens=4", "batch.new_tokens=3", "batch.repeats=2", "batch.warmup=0",
)  # fmt: skip


def environment(*, misbehaving: bool = False, **variables: str) -> dict[str, str]:
    paths = [MISBEHAVING] * misbehaving + [str(PACKAGE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}


def start(
    folder: Path, *arguments: str, misbehaving: bool = False, **variables: str
) -> subprocess.Popen[str]:
    """zinfer in `folder`, in a process group of its own, its output in files there."""
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "zinfer", *arguments],
            cwd=folder, env=environment(misbehaving=misbehaving, **variables), stdin=subprocess.DEVNULL, stdout=out, stderr=err, text=True,
            start_new_session=True,
        )  # fmt: skip


def run(
    folder: Path, *arguments: str, misbehaving: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """zinfer in `folder`, to its end."""
    process = start(folder, *arguments, misbehaving=misbehaving, **variables)
    code = process.wait(300)
    return subprocess.CompletedProcess(
        process.args, code, (folder / "stdout").read_text(), (folder / "stderr").read_text()
    )


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """What format=json printed: exactly one JSON document."""
    parsed = json.loads(done.stdout)
    assert isinstance(parsed, dict), done.stdout
    return parsed


def statuses(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Of the jobs of a sweep with format=json."""
    return [job["status"] for job in document(done)["jobs"]]


def runs(folder: Path) -> list[dict[str, Any]]:
    """Every run in the folder's store: its MLflow status, tags, and number of timed repeats logged."""
    with closing(sqlite3.connect(f"file:{folder / 'mlflow.db'}?mode=ro", uri=True)) as store:
        found = []
        for run_id, status in store.execute(
            "SELECT run_uuid, status FROM runs ORDER BY start_time"
        ).fetchall():
            tags = dict(
                store.execute(
                    "SELECT key, value FROM tags WHERE run_uuid = ?", (run_id,)
                ).fetchall()
            )
            count = "SELECT count(*) FROM metrics WHERE run_uuid = ? AND key = 'total_s_by_repeat'"
            (repeats,) = store.execute(count, (run_id,)).fetchone()
            found.append(
                {
                    "run_id": run_id,
                    "mlflow": status,
                    "repeats": repeats,
                    "role": tags["zinfer.role"],
                    **tags,
                }
            )
        return found


def job_runs(folder: Path) -> list[dict[str, Any]]:
    """The runs of jobs, without those of sweeps."""
    return [run for run in runs(folder) if run["role"] == "job"]


def processes(folder: Path) -> list[int]:
    """Processes that work in the folder: drivers, servers, workers and what they started."""
    found = []
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            try:
                cwd = os.readlink(process / "cwd")
                is_zombie = (process / "stat").read_text().rpartition(")")[2].split()[0] == "Z"
            except OSError:
                continue
            if Path(cwd).is_relative_to(folder) and not is_zombie:
                found.append(int(process.name))
    return found


def files_named(folder: Path, name: str) -> list[Path]:
    """Files of that name at any depth, while others delete around them (rglob raises when a folder goes away)."""
    return [Path(root) / name for root, _, files in os.walk(folder) if name in files]


def swap_folders(folder: Path) -> list[Path]:
    return [
        Path(root) / name
        for root, folders, _ in os.walk(folder)
        for name in folders
        if name.startswith("zinfer-swap-")
    ]


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """The condition's value when it is true. AssertionError after so long."""
    deadline_s = time.monotonic() + seconds
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"no {what} after {seconds} s"
        time.sleep(0.02)
    return value


def events_of(folder: Path, name: str) -> list[Path]:
    """Event logs below the folder in which the worker has got to this phase or event."""
    return [
        path
        for path in files_named(folder / "multirun", "events.jsonl")
        if f'"{name}"' in path.read_text()
    ]


def nothing_is_left(folder: Path) -> None:
    """No process, no swap file, no RUNNING run."""
    wait_until(lambda: not processes(folder), 30, "end of every process")
    assert not swap_folders(folder)
    assert [run for run in runs(folder) if run["mlflow"] == "RUNNING"] == []
