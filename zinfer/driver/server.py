"""Start the server that forks workers for a sweep's jobs, and talk to it.

The server is `python -m zinfer.worker.server`. Jobs whose workers need another environment while
they import libraries need a server of their own.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path

from zinfer.job.files import ATTEMPT_VARIABLE
from zinfer.job.messages import CHILD_GRACE_S, MESSAGE_BYTES
from zinfer.job.processes import stat_fields

JOB_VARIABLES = frozenset(
    {
        "RANK",
        "LOCAL_RANK",
        "WORLD_SIZE",
        "LOCAL_WORLD_SIZE",
        "MASTER_ADDR",
        "MASTER_PORT",
        ATTEMPT_VARIABLE,
    }
)
"""Read when the process group is made, long after the imports: they may differ from job to job."""
DRIVER_PREFIXES = ("MLFLOW_", "_MLFLOW_", "GIT_PYTHON_", "ZINFER_PARENT")
"""Set by the driver for itself while it logs; no worker reads them."""
NO_CUDA_IN_SERVER = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""torch asks NVML, not CUDA, for devices; the allocator inside pyarrow starts no thread."""


READY_S = 180.0
"""Longest wait for the server's imports, which take 5 to 30 s."""
FORK_S = 20.0
"""Longest wait for a fork, which takes milliseconds."""
REPORT_S = 2.0
"""After a worker has ended: the time in which its server has to report that."""


class WorkerServer:
    """A running server, and the workers that it forked."""

    def __init__(self, environment: Mapping[str, str]) -> None:
        self.key = server_key(environment)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(FORK_S)
        self._socket = ours
        self._ended: dict[int, int] = {}
        self._seen_ended_s: dict[int, float] = {}
        self._alive = True
        self._unfit: str | None = None
        self._is_ready = False
        self._started: list[int] = []
        self._process = subprocess.Popen(
            [sys.executable, "-m", "zinfer.worker.server", str(theirs.fileno())],
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
        """Return the server's own process id."""
        return self._process.pid

    @property
    def alive(self) -> bool:
        """True while it can still fork."""
        self._take_messages(0)
        return self._alive

    def is_stopped(self) -> bool:
        """Say whether somebody has stopped the process (SIGSTOP, a debugger)."""
        fields = stat_fields(self.pid)
        return fields is not None and fields[0] in ("T", "t")

    def unfit_reason(self, give_up: Callable[[], bool]) -> str | None:
        """Wait until the imports are done. Why this server may not fork, or None."""
        deadline_s = time.monotonic() + READY_S
        while not self._is_ready and self._alive:
            self._take_messages(0.1)
            if give_up():
                return "it was not waited for"
            if self.is_stopped():
                return "it is stopped"
            if time.monotonic() > deadline_s:
                return f"its imports took more than {READY_S:.0f} s"
        if not self._alive:
            return "it ended while it imported"
        return "it is stopped" if self.is_stopped() else self._unfit

    def fork(self, job_dir: Path, environment: Mapping[str, str], log: Path) -> ForkedWorker | None:
        """Fork a worker for this job. None where the server cannot, or does not within FORK_S."""
        request = {"job_dir": str(job_dir), "environment": dict(environment), "log": str(log)}
        self._started = []
        deadline_s = time.monotonic() + FORK_S
        try:
            self._socket.send(json.dumps(request).encode())
        except OSError:
            return None
        while not self._started and self._alive and time.monotonic() < deadline_s:
            self._take_messages(0.1)
            if self.is_stopped():
                break
        if not self._started:
            self.kill()
            return None
        return ForkedWorker(self, self._started[0])

    def returncode_of(self, pid: int, timeout_s: float) -> int | None:
        """Return a worker's exit code as subprocess has it, None while it runs.

        A server that does not report (it died, or is stopped) is not waited for: the kernel keeps
        the code of a worker that nobody has collected; of one that is gone it counts as killed.
        """
        if pid not in self._ended:
            self._take_messages(timeout_s)
        if pid not in self._ended and (fields := stat_fields(pid) or ["gone"])[0] in ("Z", "gone"):
            seen_s = self._seen_ended_s.setdefault(pid, time.monotonic())
            if not self._alive or time.monotonic() - seen_s > REPORT_S:
                self._ended[pid] = _exit_code(fields)
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
                    self._started.append(said["pid"])
                case "ended":
                    self._ended[said["pid"]] = said["returncode"]

    def kill(self) -> None:
        """End it at once, whatever it does."""
        self._alive = False
        self._process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # in an uninterruptible read
            self._process.wait(CHILD_GRACE_S)

    def close(self) -> None:
        """End it. Its workers have ended before."""
        self._alive = False
        self._socket.close()
        try:
            self._process.wait(0 if self.is_stopped() else CHILD_GRACE_S)
        except subprocess.TimeoutExpired:
            self.kill()


def _exit_code(fields: list[str]) -> int:
    """Read an ended process's exit code in /proc/PID/stat. Source: proc(5), field 52."""
    if fields[0] != "Z" or len(fields) < 50:
        return -signal.SIGKILL
    return os.waitstatus_to_exitcode(int(fields[49]))


class ForkedWorker:
    """A worker that is not our own child: what of subprocess.Popen the driver uses."""

    def __init__(self, server: WorkerServer, pid: int) -> None:
        self._server = server
        self.pid = pid

    @property
    def returncode(self) -> int | None:
        """Its exit code, or None while it runs."""
        return self.poll()

    def poll(self) -> int | None:
        """Return its exit code, negative for a signal; None while it runs."""
        return self._server.returncode_of(self.pid, 0)

    def wait(self, timeout: float | None = None) -> int:
        """Return its exit code.

        Raises:
            subprocess.TimeoutExpired: it still runs.
        """
        deadline_s = None if timeout is None else time.monotonic() + timeout
        while (code := self._server.returncode_of(self.pid, 0.05)) is None:
            if deadline_s is not None and time.monotonic() > deadline_s:
                raise subprocess.TimeoutExpired("zinfer.worker", timeout or 0)
        return code


def server_key(environment: Mapping[str, str]) -> str:
    """Return the key of an environment: workers with the same key may come from one server."""
    decisive = {
        name: value
        for name, value in environment.items()
        if name not in JOB_VARIABLES and not name.startswith(DRIVER_PREFIXES)
    }
    return json.dumps(decisive, sort_keys=True)
