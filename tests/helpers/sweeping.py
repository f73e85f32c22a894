"""Start zinfer as a user does, in a process of its own, and look at what it leaves behind."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from zinfer.tracking.reading import open_to_read

PACKAGE = Path(__file__).parents[2]
MISBEHAVING = str(Path(__file__).parents[1] / "misbehaving")
TINY = (
    "model=tiny-llama", "dtype=float32", "launcher.omp_threads=1", "hardware.accelerator=cpu",
    "batch.prompt_tokens=4", "batch.new_tokens=3", "batch.repeats=2", "batch.warmup=0",
    "sweep.reuse_disturbed=true", "sweep.report=false",
)  # fmt: skip
"""A job of a second. Its runs are reused also where the machine that tests has other work."""
BUSY = 3
"""Times as long as on a quiet machine is waited for what must come: others may compute, too."""


def environment(*, misbehaving: bool = False, **variables: str) -> dict[str, str]:
    """Return a zinfer process's environment: this code, one thread, and these variables.

    With `misbehaving`, workers fail as their batch.seed says: see tests/README.md.
    """
    paths = [MISBEHAVING] * misbehaving + [str(PACKAGE)]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **variables}


def start(
    folder: Path, *arguments: str, misbehaving: bool = False, **variables: str
) -> subprocess.Popen[str]:
    """Start zinfer in `folder`, in a process group of its own, its output in files there."""
    with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
        return subprocess.Popen(
            [sys.executable, "-m", "zinfer", *arguments],
            cwd=folder,
            env=environment(misbehaving=misbehaving, **variables),
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            text=True,
            start_new_session=True,
        )


def run(
    folder: Path, *arguments: str, misbehaving: bool = False, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run zinfer in `folder` to its end."""
    process = start(folder, *arguments, misbehaving=misbehaving, **variables)
    code = process.wait(300)
    return subprocess.CompletedProcess(
        process.args, code, (folder / "stdout").read_text(), (folder / "stderr").read_text()
    )


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Parse the one JSON document that format=json printed."""
    parsed = json.loads(done.stdout)
    assert isinstance(parsed, dict), done.stdout
    return parsed


def statuses(done: subprocess.CompletedProcess[str]) -> list[str]:
    """Return the status of each job of a sweep with format=json."""
    return [job["status"] for job in document(done)["jobs"]]


def runs(folder: Path) -> list[dict[str, Any]]:
    """Read every run of the folder's store: status in MLflow, tags, number of repeats logged."""
    with open_to_read(folder / "mlflow.db") as store:
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
    """Read the runs of jobs, without those of sweeps."""
    return [run for run in runs(folder) if run["role"] == "job"]


def processes(folder: Path) -> list[int]:
    """Find the processes that work in the folder: drivers, servers, workers and their children."""
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
    """Find the files of that name at any depth, while others delete folders around them.

    Path.rglob raises when a folder goes away.
    """
    return [Path(root) / name for root, _, files in os.walk(folder) if name in files]


def swap_folders(folder: Path) -> list[Path]:
    """Find swap folders below this folder."""
    return [
        Path(root) / name
        for root, folders, _ in os.walk(folder)
        for name in folders
        if name.startswith("zinfer-swap-")
    ]


def wait_until(condition: Callable[[], Any], seconds: float, what: str) -> Any:
    """Return the condition's value once it is true. AssertionError after BUSY times `seconds`."""
    deadline_s = time.monotonic() + BUSY * seconds
    while not (value := condition()):
        assert time.monotonic() < deadline_s, f"no {what} after {BUSY * seconds} s"
        time.sleep(0.02)
    return value


def events_of(folder: Path, name: str) -> list[Path]:
    """Find event logs below the folder in which the worker has reached this phase or event."""
    return [
        path
        for path in files_named(folder / "multirun", "events.jsonl")
        if f'"{name}"' in text_of(path)
    ]


def text_of(path: Path) -> str:
    """Read a file that others may move or delete meanwhile; empty where it is gone."""
    try:
        return path.read_text()
    except OSError:
        return ""


def delete(folder: Path) -> None:
    """Delete a folder in which others write."""
    while folder.exists():
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.01)


def nothing_is_left(folder: Path) -> None:
    """Check that no process, no swap file and no RUNNING run is left."""
    wait_until(lambda: not processes(folder), 30, "end of every process")
    assert not swap_folders(folder)
    assert [run for run in runs(folder) if run["mlflow"] == "RUNNING"] == []
