"""Holds the imports of a worker ready and forks one for each job of a sweep: a process per job without paying 5-10 s of imports again.

`python -m zinfer.worker_server SOCKET_FD`, started by the driver. The server imports and nothing else: it starts no thread, never
initialises CUDA, and says that it is unfit if a library did either; then every job gets a fresh process. It ends when its driver does.
Variables that libraries read while they are imported are the server's own, so jobs that differ in one need a server of their own.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zinfer.mapped_pages import touch, touched_file_ranges
from zinfer.worker_imports import import_everything

JOB_VARIABLES = frozenset({"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"})
"""Read when the process group is made, long after the imports: they may differ from job to job."""
DRIVER_PREFIXES = ("MLFLOW_", "_MLFLOW_", "GIT_PYTHON_", "ZINFER_PARENT")
"""What the driver sets for itself while it logs; no worker reads it."""
NO_CUDA_IN_SERVER = {"PYTORCH_NVML_BASED_CUDA_CHECK": "1", "JE_ARROW_MALLOC_CONF": "background_thread:false"}
"""torch asks NVML, not CUDA, whether there is a device; the allocator inside pyarrow starts no thread."""
MESSAGE_BYTES = 1 << 20
CHILD_GRACE_S = 3.0
"""After the driver's death its workers remove their swap folders and end by themselves; later they are killed."""


# The driver's side


class WorkerServer:
    """A running server, and the workers that it forked."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.key = server_key(environment)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._socket = ours
        self._ended: dict[int, int] = {}
        self._alive = True
        self._unfit: str | None = None
        self._is_ready = False
        self._started: int | None = None
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zinfer.worker_server", str(theirs.fileno())],
            env={**environment, **NO_CUDA_IN_SERVER},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()

    @property
    def pid(self) -> int:
        """Of the server itself."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """Whether it can still fork."""
        self._take_messages(0)
        return self._alive

    def unfit_reason(self, give_up: Any = lambda: False) -> str | None:
        """Waits until the imports are done; why this server may not fork, or None."""
        while not self._is_ready and self._alive and not give_up():
            self._take_messages(0.1)
        if not self._alive:
            return "it ended while it imported"
        return self._unfit if self._is_ready else "interrupted"

    def fork(self, job_dir: Path, environment: Mapping[str, str], log: Path) -> ForkedWorker | None:
        """A worker for this job; None where the server cannot."""
        request = {"job_dir": str(job_dir), "environment": dict(environment), "log": str(log)}
        try:
            self._socket.send(json.dumps(request).encode())
        except OSError:
            return None
        self._started = None
        while self._started is None and self._alive:
            self._take_messages(0.1)
        return ForkedWorker(self, self._started) if self._started is not None else None

    def returncode_of(self, pid: int, timeout_s: float) -> int | None:
        """As subprocess has it (negative for a signal), None while it runs; a worker whose server died counts as killed."""
        if pid not in self._ended:
            self._take_messages(timeout_s)
        if pid not in self._ended and not self._alive and not Path(f"/proc/{pid}").exists():
            self._ended[pid] = -signal.SIGKILL
        return self._ended.get(pid)

    def _take_messages(self, timeout_s: float) -> None:
        while self._alive and select.select([self._socket], [], [], timeout_s)[0]:
            timeout_s = 0
            try:
                message = self._socket.recv(MESSAGE_BYTES)
            except OSError:
                message = b""
            if not message:
                self._alive = False
                return
            said = json.loads(message)
            match said["event"]:
                case "ready":
                    self._is_ready, self._unfit = True, said["unfit"]
                case "started":
                    self._started = said["pid"]
                case "ended":
                    self._ended[said["pid"]] = said["returncode"]

    def close(self) -> None:
        """End it. Its workers have ended before."""
        self._alive = False
        self._socket.close()
        try:
            self._process.wait(CHILD_GRACE_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


class ForkedWorker:
    """A worker that is not our own child: what of subprocess.Popen the driver uses."""

    def __init__(self, server: WorkerServer, pid: int) -> None:
        self._server = server
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        return self.poll()

    def poll(self) -> int | None:
        """Its exit code, negative for a signal; None while it runs."""
        return self._server.returncode_of(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        """Raises subprocess.TimeoutExpired."""
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (code := self._server.returncode_of(self.pid, 0.05)) is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("zinfer.worker", timeout or 0)
        return code


def server_key(environment: Mapping[str, str]) -> str:
    """Workers with the same key may come from one server."""
    decisive = {name: value for name, value in environment.items() if name not in JOB_VARIABLES and not name.startswith(DRIVER_PREFIXES)}
    return json.dumps(decisive, sort_keys=True)


# The server's side


def unfit_to_fork() -> str | None:
    """Why a forked copy of this process would not be like a fresh one; None when it would."""
    import torch

    threads = len(os.listdir("/proc/self/task"))
    if threads != 1:
        return f"its imports started {threads - 1} threads"
    return "its imports initialised CUDA" if torch.cuda.is_initialized() else None


def serve(channel: socket.socket) -> None:
    """Fork a worker for each request, report each end, until the driver is gone."""
    import_everything()
    gc.collect()
    gc.freeze()  # the collector of a worker then leaves the shared pages alone
    touched = touched_file_ranges()
    channel.send(json.dumps({"event": "ready", "unfit": unfit_to_fork()}).encode())
    wake_read, wake_write = os.pipe()
    os.set_blocking(wake_read, False)
    os.set_blocking(wake_write, False)
    signal.set_wakeup_fd(wake_write)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        readable, _, _ = select.select([channel.fileno(), wake_read], [], [])
        if wake_read in readable:
            os.read(wake_read, 4096)
        for pid, returncode in ended_children(children):
            channel.send(json.dumps({"event": "ended", "pid": pid, "returncode": returncode}).encode())
        if channel.fileno() in readable:
            request = channel.recv(MESSAGE_BYTES)
            if not request:
                end_children(children)
                return
            pid = os.fork()
            if pid == 0:
                for descriptor in (wake_read, wake_write):
                    os.close(descriptor)
                channel.close()
                become_worker(json.loads(request), touched)
            children.add(pid)
            channel.send(json.dumps({"event": "started", "pid": pid}).encode())


def ended_children(children: set[int]) -> list[tuple[int, int]]:
    """(pid, exit code or negative signal) of those that ended, taken out of the set."""
    ended = []
    for pid in sorted(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def end_children(children: set[int]) -> None:
    """The driver is gone: its workers notice by themselves; those that cannot are killed."""
    deadline_s = time.monotonic() + CHILD_GRACE_S
    while children and time.monotonic() < deadline_s:
        ended_children(children)
        time.sleep(0.05)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def become_worker(request: dict[str, Any], touched: list[tuple[int, int]]) -> None:
    """In the forked child: everything that a fresh process would have of its own, then the worker's story. Does not return."""
    code = 1
    try:
        os.setsid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        log = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.close(log)
        touch(touched)
        os.environ.clear()
        os.environ.update(request["environment"])
        from zinfer import worker

        code = worker.main(Path(request["job_dir"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
