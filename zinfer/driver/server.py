"""Start the server that forks workers for a sweep's jobs, and talk to it.

The server is `python -m zinfer.worker.server`. Jobs whose workers need another environment while
they import libraries need a server of their own.
"""

from __future__ import annotations

import json
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from zinfer.job.messages import CHILD_GRACE_S, MESSAGE_BYTES

JOB_VARIABLES = frozenset(
    {"RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}
)
"""Read when the process group is made, long after the imports: they may differ from job to job."""
DRIVER_PREFIXES = ("MLFLOW_", "_MLFLOW_", "GIT_PYTHON_", "ZINFER_PARENT")
"""What the driver sets for itself while it logs; no worker reads it."""
NO_CUDA_IN_SERVER = {
    "PYTORCH_NVML_BASED_CUDA_CHECK": "1",
    "JE_ARROW_MALLOC_CONF": "background_thread:false",
}
"""torch asks NVML, not CUDA, whether there is a device; the allocator inside pyarrow starts no thread."""


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
    decisive = {
        name: value
        for name, value in environment.items()
        if name not in JOB_VARIABLES and not name.startswith(DRIVER_PREFIXES)
    }
    return json.dumps(decisive, sort_keys=True)
