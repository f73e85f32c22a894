"""Every wait has an end: a store that hangs, a server that is stopped, and the second Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    files_named,
    nothing_is_left,
    processes,
    run,
    start,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate
from zinfer.tracking.deadline import LeftBehind, within
from zinfer.tracking.store import TrackingUnavailable

HEALTH = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\nConnection: close\r\n\r\nOK"


@contextmanager
def hanging_server() -> Iterator[str]:
    """Serve an MLflow URI that answers /health and nothing else, ever."""
    with closing(socket.create_server(("127.0.0.1", 0))) as listening:
        kept: list[socket.socket] = []

        def serve() -> None:
            while True:
                try:
                    client, _ = listening.accept()
                except OSError:
                    return
                kept.append(client)
                if client.recv(4096).startswith(b"GET /health"):
                    client.sendall(HEALTH)
                    client.close()

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        for client in kept:
            client.close()


def test_a_call_that_hangs_ends_with_its_time() -> None:
    stop = threading.Event()
    with pytest.raises(TrackingUnavailable, match=r"the store did not answer within 0\.2 s.*=0\.4"):
        within(0.2, lambda: stop.wait(300), "the store")
    assert LeftBehind.alive()
    stop.set()
    wait_until(lambda: not LeftBehind.alive(), 5, "end of the thread")


def test_a_call_that_hangs_is_given_up() -> None:
    stop = threading.Event()
    with pytest.raises(TrackingUnavailable, match="interrupted"):
        within(30, lambda: stop.wait(30), "the store", lambda: True)
    stop.set()


def test_a_call_gives_its_value_or_its_exception() -> None:
    assert within(5, lambda: 3, "the store") == 3
    with pytest.raises(KeyError):
        within(5, lambda: {}["x"], "the store")


@pytest.mark.slow
def test_a_store_that_hangs_costs_its_timeout_and_no_result(tmp_path: Path) -> None:
    with hanging_server() as uri:
        store = ("tracking=server", f"tracking.uri={uri}", "tracking.timeout_s=4")
        done = run(tmp_path, *TINY, *store, "format=json")
    assert (done.returncode, document(done)["status"]) == (0, "ok"), done.stderr
    assert "did not answer within 4 s" in done.stderr and "task=upload" in done.stderr
    sent = run(tmp_path, "task=upload", "tracking=sqlite", "format=json")
    assert "1 of 1 runs sent" in document(sent)["reason"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "signals", [(signal.SIGINT, signal.SIGINT), (signal.SIGINT, signal.SIGTERM)]
)
def test_the_second_signal_ends_the_wait_for_a_store(
    signals: tuple[signal.Signals, ...], tmp_path: Path
) -> None:
    with hanging_server() as uri:
        store = ("tracking=server", f"tracking.uri={uri}", "tracking.timeout_s=500")
        process = start(tmp_path, *TINY, *store, f"batch.seed={fate.SLEEP}", "format=json")
        wait_until(lambda: files_named(tmp_path, "workers.json"), 90, "worker")
        time.sleep(2)
        for sign in signals:
            process.send_signal(sign)
            time.sleep(1)
        assert process.wait(120) == 130, "the store would be waited for 500 s"
    assert json.loads(next(tmp_path.rglob("result.json")).read_text())["ended_by"] == "interrupted"
    wait_until(lambda: not processes(tmp_path), 10, "end of every process")


@pytest.mark.slow
def test_a_run_of_a_killed_driver_on_a_store_that_hangs_delays_no_plan(tmp_path: Path) -> None:
    cache = {"ZINFER_CACHE": str(tmp_path / "cache")}
    cache["XDG_CACHE_HOME"] = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    with hanging_server() as uri:
        store = ("tracking=server", f"tracking.uri={uri}", "tracking.timeout_s=500")
        killed = start(tmp_path, *TINY, *store, **cache)
        wait_until(lambda: files_named(tmp_path, "environment.json"), 90, "environment")
        killed.kill()
        killed.wait()
        # A wait for the store would last 500 s, and run() gives up after 300.
        plan = run(tmp_path, *TINY, "task=plan", "format=json", **cache)
        assert document(plan)["status"] == "planned"
        next_one = run(tmp_path, *TINY, "tracking=sqlite", "format=json", **cache)
        assert document(next_one)["status"] == "ok"
        assert "closed at a later start" in next_one.stderr
    wait_until(lambda: not processes(tmp_path), 30, "end of every process")


@pytest.mark.slow
def test_a_stopped_server_of_workers_delays_no_job(tmp_path: Path) -> None:
    """Stopped while it imports, and again between two jobs."""
    sweep = start(tmp_path, "-m", *TINY, "batch.seed=1,2,3", "format=json")
    server = wait_until(lambda: servers(tmp_path), 60, "server")
    os.kill(server[0], signal.SIGSTOP)
    assert statuses_without_its_server(sweep, tmp_path) == ["ok"] * 3
    nothing_is_left(tmp_path)


@pytest.mark.slow
def test_a_server_stopped_while_its_worker_runs_loses_neither_result_nor_time(
    tmp_path: Path,
) -> None:
    sweep = start(tmp_path, "-m", *TINY, "batch.seed=1,2", "batch.repeats=300", "format=json")
    wait_until(lambda: files_named(tmp_path, "workers.json"), 90, "worker")
    (server,) = servers(tmp_path)
    os.kill(server, signal.SIGSTOP)
    assert statuses_without_its_server(sweep, tmp_path) == ["ok"] * 2
    nothing_is_left(tmp_path)


def statuses_without_its_server(sweep: subprocess.Popen[str], folder: Path) -> list[str]:
    """Wait for a sweep whose server is stopped, end the server, and return each job's status."""
    try:
        assert sweep.wait(200) == 0, (folder / "stderr").read_text()
    finally:
        for pid in servers(folder):
            with suppress(ProcessLookupError):  # it may be about to end
                os.kill(pid, signal.SIGKILL)
    said = json.loads((folder / "stdout").read_text())
    return [job["status"] for job in said["jobs"]]


def servers(folder: Path) -> list[int]:
    """Return the worker servers that belong to commands in this folder."""
    return [
        pid
        for pid in processes(folder)
        if b"zinfer.worker.server" in command_line(pid) and parent_is_driver(pid)
    ]


def command_line(pid: int) -> bytes:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return b""


def parent_is_driver(pid: int) -> bool:
    """A forked worker has the server's command line, and the server as its parent."""
    try:
        parent = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
    except OSError:
        return False
    return b"zinfer.worker.server" not in command_line(parent)
