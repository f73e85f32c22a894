"""Start, watch and end the worker's processes, one for each rank of this host.

Ranks are started here and not by torchrun: it puts each rank in a session of its own, where the end
of the driver does not reach it, and it reports a dead rank only in its log. The variables are
torchrun's own, so DeepSpeed and torch.distributed see no difference.
"""

from __future__ import annotations

import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import ClassVar

from zinfer.config import RunConfig
from zinfer.driver.server import ForkedWorker, WorkerServer, server_key
from zinfer.job.files import ATTEMPT_VARIABLE, WORKER_LOG
from zinfer.machine import native_ops

END_GRACE_S = 2.0
"""Time between SIGTERM and SIGKILL for a worker that is told to end."""
RANK_GRACE_S = 2.0
"""After one rank has died: time for the others, which wait for it, to say why they end."""

RankProcess = subprocess.Popen[bytes] | ForkedWorker


class Worker:
    """All ranks of one job on this host."""

    def __init__(self, ranks: list[RankProcess]) -> None:
        self.ranks = ranks
        self.first_failed: int | None = None
        """Local rank of the first process that ended badly."""
        self._pidfds = {
            rank: fd
            for rank, process in enumerate(ranks)
            if (fd := _pidfd(process.pid)) is not None
        }
        self._failed_s = 0.0

    @property
    def returncode(self) -> int:
        """Exit code of the rank that failed first; 0 when none did."""
        if self.first_failed is None:
            return 0
        return self.ranks[self.first_failed].poll() or 0

    def wait(self, timeout_s: float) -> bool:
        """Sleep until a rank ends, at most timeout_s. True when the job is over.

        It is over when all ranks ended, or when one failed and the others had time to say why.
        """
        running = [fd for rank, fd in self._pidfds.items() if self.ranks[rank].poll() is None]
        unreported = bool(select.select(running, [], [], 0)[0])
        if running and not unreported:
            select.select(running, [], [], timeout_s)
        elif any(process.poll() is None for process in self.ranks):
            time.sleep(
                min(timeout_s, 0.1)
            )  # a kernel without pidfd, or a forked worker whose end is not reported yet
        codes = [process.poll() for process in self.ranks]
        failed = [rank for rank, code in enumerate(codes) if code]
        if failed and self.first_failed is None:
            self.first_failed = min(
                failed, key=lambda rank: (codes[rank] == 1, codes[rank])
            )  # what could not report its end comes first
            self._failed_s = time.monotonic()
        if all(code is not None for code in codes):
            return True
        return self.first_failed is not None and time.monotonic() - self._failed_s > RANK_GRACE_S

    def end(self) -> None:
        """End every rank and everything that they started: asked first, then killed."""
        for sign, grace_s in ((signal.SIGTERM, END_GRACE_S), (signal.SIGKILL, 30.0)):
            running = [process for process in self.ranks if process.poll() is None]
            for process in running:
                signal_group(process.pid, sign)
            deadline_s = time.monotonic() + grace_s
            for process in running:
                try:
                    process.wait(max(0.0, deadline_s - time.monotonic()))
                except subprocess.TimeoutExpired:
                    continue
        for process in self.ranks:
            signal_group(process.pid, signal.SIGKILL)  # what outlived its leader
        for fd in self._pidfds.values():
            os.close(fd)
        self._pidfds = {}


def _pidfd(pid: int) -> int | None:
    try:
        return os.pidfd_open(pid)
    except OSError:  # it has ended, or the kernel is older than 5.3
        return None


def signal_group(group: int, sign: signal.Signals) -> None:
    """Signal a process group that may be gone."""
    try:
        os.killpg(group, sign)
    except (ProcessLookupError, PermissionError):
        return


def start_worker(
    config: RunConfig, job_dir: Path, attempt: str, server: WorkerServer | None
) -> Worker:
    """Start one process for each rank of this host, forked by the server where there is one.

    Their output goes to JOB_DIR/worker.log.
    """
    port = config.launcher.master_port or free_port()
    started: list[RankProcess] = []
    for local_rank in range(config.launcher.ranks):
        environment = worker_environment(config) | rank_variables(config, local_rank, port)
        environment[ATTEMPT_VARIABLE] = attempt
        forked = (
            server.fork(job_dir, environment, job_dir / WORKER_LOG) if server is not None else None
        )
        started.append(forked or _fresh(job_dir, environment))
    return Worker(started)


def _fresh(job_dir: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (job_dir / WORKER_LOG).open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "zinfer.worker", str(job_dir)],
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the driver alone; it ends the worker in order
        )


def worker_environment(config: RunConfig) -> dict[str, str]:
    """Return every rank's environment: what must be set before torch and DeepSpeed are imported."""
    env = {**os.environ, **native_ops.worker_environment()}
    threads = config.launcher.omp_threads or max(
        1, len(os.sched_getaffinity(0)) // config.launcher.ranks
    )
    env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault(
        "OPENBLAS_NUM_THREADS", "1"
    )  # numpy starts its threads when it is imported; no timed work is numpy's
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env.setdefault(
        "CUDA_DEVICE_ORDER", "PCI_BUS_ID"
    )  # the order in which the driver has looked at the GPUs
    env["PYTHONPATH"] = os.pathsep.join(
        [str(Path(__file__).parents[2]), *filter(None, [env.get("PYTHONPATH")])]
    )
    if config.hardware.accelerator != "auto":
        env["DS_ACCELERATOR"] = config.hardware.accelerator
    return env


def rank_variables(config: RunConfig, local_rank: int, port: int) -> dict[str, str]:
    """Return what torchrun would set for this rank.

    Source: docs.pytorch.org/docs/stable/elastic/run.html, Environment Variables.
    """
    launcher = config.launcher
    address, _, rendezvous_port = (launcher.rendezvous or f"127.0.0.1:{port}").rpartition(":")
    return {
        "RANK": str(launcher.node_rank * launcher.ranks + local_rank),
        "LOCAL_RANK": str(local_rank),
        "WORLD_SIZE": str(launcher.nodes * launcher.ranks),
        "LOCAL_WORLD_SIZE": str(launcher.ranks),
        "MASTER_ADDR": address,
        "MASTER_PORT": rendezvous_port,
    }


def free_port() -> int:
    """Return a TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


class Servers:
    """The one server of this process. Its memory is not free: jobs may have it replaced."""

    current: ClassVar[WorkerServer | None] = None
    unfit: ClassVar[dict[str, str]] = {}
    """Key -> why its jobs need fresh processes."""

    @classmethod
    def prepare(cls, config: RunConfig) -> None:
        """Start the server for jobs like this one; does not wait for its imports."""
        environment = worker_environment(config)
        key = server_key(environment)
        if cls.current is not None and (
            cls.current.key != key or not cls.current.alive or cls.current.is_stopped()
        ):
            cls.close()
        if cls.current is None and key not in cls.unfit:
            cls.current = WorkerServer(environment)

    @classmethod
    def ready(cls, config: RunConfig, give_up: Callable[[], bool]) -> WorkerServer | None:
        """Return the server when its imports are done; None where the job needs a fresh process."""
        cls.prepare(config)
        if cls.current is None:
            return None
        reason = cls.current.unfit_reason(give_up)
        if reason is not None:
            cls.unfit[cls.current.key] = reason
            cls.current.kill()
            cls.close()
        return cls.current

    @classmethod
    def close(cls) -> None:
        """End the server, if there is one."""
        if cls.current is not None:
            cls.current.close()
            cls.current = None
