"""Attack zinfer at random for minutes: `make test-faults`. Seeded; longer than the suite allows.

FAULTS_SEED chooses the attacks, FAULTS_S the seconds of each loop. A failure names its seed and
round, so that the same attacks can be made again.
"""

from __future__ import annotations

import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    environment,
    files_named,
    job_runs,
    nothing_is_left,
    processes,
    run,
    start,
    statuses,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate
from zinfer.job.swap import PREFIX, remove_orphaned_swap_folders

LOOP_S = float(os.environ.get("FAULTS_S", "0"))
SEED = int(os.environ.get("FAULTS_SEED", "1"))
pytestmark = [
    pytest.mark.skipif(not LOOP_S, reason="minutes of attacks: make test-faults"),
    pytest.mark.timeout(LOOP_S + 900),
]
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGSEGV, signal.SIGABRT, signal.SIGSTOP)


def rounds() -> Iterator[tuple[int, random.Random]]:
    """Yield number and chance of each round, until the loop's time is over; at least one."""
    deadline_s = time.monotonic() + LOOP_S
    number = 0
    while number == 0 or time.monotonic() < deadline_s:
        print(f"seed {SEED}, round {number}", flush=True)
        yield number, random.Random(1000 * SEED + number)
        number += 1


def end_all(folder: Path) -> None:
    """Kill what still works in the folder; stopped processes go on first."""
    for sign in (signal.SIGCONT, signal.SIGKILL):
        for pid in processes(folder):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
    wait_until(lambda: not processes(folder), 30, "end of every process")


def test_processes_of_sweeps_are_signalled_at_random(tmp_path: Path, built_ops: list[str]) -> None:
    """Drivers, servers and workers of two sweeps that share a store, a swap path and a cache."""
    (tmp_path / "nvme").mkdir()
    shared = (
        "offload=nvme", f"offload.nvme_path={tmp_path / 'nvme'}", "hydra.sweep.dir=here",
        f"tracking.uri=sqlite:///{tmp_path / 'mlflow.db'}", "format=json", "launcher.timeout_s=60",
    )  # fmt: skip
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    for number, chance in rounds():
        seeds = f"batch.seed=range({10 * number},{10 * number + 4})"
        sweeps = [start(folder, "-m", *TINY, *shared, seeds) for folder in folders]
        until_s = time.monotonic() + chance.uniform(2, 25)
        while time.monotonic() < until_s and any(sweep.poll() is None for sweep in sweeps):
            time.sleep(chance.uniform(0.05, 2))
            pids = processes(tmp_path)
            if pids:
                with suppress(ProcessLookupError):
                    os.kill(chance.choice(pids), chance.choice(SIGNALS))
        end_all(tmp_path)
        for sweep in sweeps:
            sweep.wait()
        again = run(folders[0], "-m", *TINY, *shared, seeds)
        assert set(statuses(again)) == {"ok"}, again.stderr
        for job in document(again)["jobs"]:
            (logged,) = [found for found in job_runs(tmp_path) if found["run_id"] == job["run_id"]]
            assert (logged["mlflow"], logged["zinfer.status"]) == ("FINISHED", "ok")
            assert logged["repeats"] == 2
        nothing_is_left(tmp_path)
        assert list((tmp_path / "nvme").iterdir()) == []


def test_one_folder_is_used_for_everything_in_turn(tmp_path: Path) -> None:
    """Require that all that is said, stored and logged is the same, and of this very use."""
    ends: dict[str, tuple[str, ...]] = {
        "ok": (),
        "error": (f"batch.seed={fate.RAISE}",),
        "killed": (f"batch.seed={fate.KILLED}",),
        "timeout": ("launcher.timeout_s=0.05",),
        "does_not_fit": ("model=bloom-176b",),
        "planned": ("task=plan",),
        "refused": ("batch.repeats=0",),
    }
    seen: set[str] = set()
    for number, chance in rounds():
        status = chance.choice(list(ends))
        if chance.random() < 0.3:
            lost = start(
                tmp_path, *TINY, "hydra.run.dir=here", f"batch.seed={fate.SLEEP}", misbehaving=True
            )
            time.sleep(chance.uniform(0.2, 12))
            lost.kill()
            lost.wait()
            wait_until(lambda: not processes(tmp_path), 30, "end of the worker")
        overrides = (*TINY, "hydra.run.dir=here", f"batch.seed={1000 + number}", "format=json")
        done = run(tmp_path, *overrides, *ends[status], misbehaving=True)
        said = document(done)
        assert said["status"] == status, (number, done.stderr)
        stored = json.loads((tmp_path / "here" / "result.json").read_text())
        assert (stored["status"], stored.get("run_id")) == (status, said.get("run_id"))
        assert bool(said.get("metrics")) == (status == "ok"), number
        if run_id := said.get("run_id"):
            assert run_id not in seen, number
            seen.add(run_id)
            (logged,) = [found for found in job_runs(tmp_path) if found["run_id"] == run_id]
            assert logged["zinfer.status"] == status
    last = run(tmp_path, *TINY, "hydra.run.dir=here", "format=json")
    assert document(last)["status"] == "ok"
    nothing_is_left(tmp_path)


OWNER = """
import sys, time
from pathlib import Path
from zinfer.job.swap import claimed_swap_folder, remove_swap_folder
number = 0
while True:
    attempt = f"{int(sys.argv[2]):08x}{number:08x}"
    number += 1
    with claimed_swap_folder(sys.argv[1], attempt, Path("job")) as folder:
        (folder / "weights.bin").write_bytes(bytes(65536))
        for _ in range(20):
            time.sleep(0.005)
            assert (folder / "weights.bin").stat().st_size == 65536, "deleted while its owner lives"
        assert remove_swap_folder(folder, Path("job"))
"""


def test_swap_folders_are_claimed_and_killed_and_swept_at_once(tmp_path: Path) -> None:
    nvme, precious = tmp_path / "nvme", tmp_path / f"{PREFIX}precious"
    for folder in (nvme, precious):
        folder.mkdir()
    (precious / "thesis.tex").write_text("years")
    owners: list[subprocess.Popen[bytes]] = []
    count = 0
    for number, chance in rounds():
        while len(owners) < 4:
            count += 1
            command = [sys.executable, "-c", OWNER, str(nvme), str(count)]
            owners.append(subprocess.Popen(command, stderr=subprocess.PIPE, env=environment()))
        hostile = nvme / f"{PREFIX}{number:x}"
        with suppress(FileExistsError):
            hostile.symlink_to(precious)
        until_s = time.monotonic() + chance.uniform(0.1, 1.5)
        while time.monotonic() < until_s:
            for folder in remove_orphaned_swap_folders(str(nvme), "ext4").removed:
                assert folder.parent == nvme
        victim = owners.pop(chance.randrange(len(owners)))
        assert victim.poll() is None, victim.communicate()[1].decode()
        victim.kill()
        victim.communicate()
    for owner in owners:
        assert owner.poll() is None, owner.communicate()[1].decode()
        owner.kill()
        owner.communicate()
    remove_orphaned_swap_folders(str(nvme), "ext4")
    assert all(path.is_symlink() for path in nvme.glob(f"{PREFIX}*"))
    assert (precious / "thesis.tex").read_text() == "years"


REPLIES = ("hang", "close", "garbage", "error", "trickle", "health")


@contextmanager
def evil_server(chance: random.Random) -> Iterator[str]:
    """Serve a URI that answers each request in another wrong way."""

    def answer(client: socket.socket) -> None:
        with suppress(OSError), client:
            asked = client.recv(65536)
            reply = chance.choice(REPLIES)
            if asked.startswith(b"GET /health") and chance.random() < 0.8:
                reply = "health"
            if reply == "hang":
                time.sleep(300)
            if reply == "garbage":
                client.sendall(bytes(chance.randrange(256) for _ in range(200)))
            if reply == "error":
                client.sendall(b"HTTP/1.1 500 No\r\nContent-Length: 0\r\n\r\n")
            if reply == "health":
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}")
            if reply == "trickle":
                client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 9999\r\n\r\n")
                for _ in range(300):
                    time.sleep(1)
                    client.sendall(b" ")

    def accept(listening: socket.socket) -> None:
        while True:
            try:
                client, _ = listening.accept()
            except OSError:
                return
            threading.Thread(target=answer, args=(client,), daemon=True).start()

    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        threading.Thread(target=accept, args=(listening,), daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"


def test_a_store_that_answers_at_random_loses_no_result_and_no_time(tmp_path: Path) -> None:
    for number, chance in rounds():
        folder = tmp_path / str(number)
        folder.mkdir()
        with evil_server(chance) as uri:
            store = ("tracking=server", f"tracking.uri={uri}", "tracking.timeout_s=5")
            started_s = time.monotonic()
            process = start(folder, *TINY, *store, "format=json")
            interrupts = chance.random() < 0.4
            if interrupts:
                wait_until(lambda: files_named(folder, "workers.json"), 90, "worker")  # noqa: B023
                time.sleep(chance.uniform(0, 6))
                for _ in range(2):
                    process.send_signal(signal.SIGINT)
                    time.sleep(chance.uniform(0.1, 2))
            code = process.wait(120)
            took_s = time.monotonic() - started_s
        said: dict[str, Any] = json.loads((folder / "stdout").read_text())
        assert said["status"] in (("ok", "killed") if interrupts else ("ok",)), number
        assert code == (0 if said["status"] == "ok" else 130), number
        assert took_s < 90, number
        sent = run(folder, "task=upload", "tracking=sqlite", "format=json")
        assert sent.returncode == 0, sent.stderr
        if (folder / "mlflow.db").exists():
            assert all(found["mlflow"] != "RUNNING" for found in job_runs(folder)), number
