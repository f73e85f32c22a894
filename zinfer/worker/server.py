"""Hold a worker's imports ready and fork one worker for each job of a sweep.

Each job has a process of its own without paying 5 to 10 s of imports again. The driver starts
`python -m zinfer.worker.server SOCKET_FD`; the server ends when its driver does. It imports and
does nothing else: it starts no thread and never initialises CUDA. If a library did either, the
server says that it is unfit, and every job gets a fresh process. Variables that libraries read
while they are imported are the server's own: jobs that differ in one need another server.
"""

from __future__ import annotations

import gc
import json
import os
import select
import signal
import socket
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from zinfer.job.messages import CHILD_GRACE_S, MESSAGE_BYTES
from zinfer.machine.mapped_pages import touch, touched_file_ranges
from zinfer.worker.imports import import_everything


def unfit_to_fork() -> str | None:
    """Say why a forked copy of this process would not be like a fresh one; None when it would."""
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
            channel.send(
                json.dumps({"event": "ended", "pid": pid, "returncode": returncode}).encode()
            )
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
    """Take those that ended out of the set; return (pid, exit code or negative signal) of each."""
    ended = []
    for pid in sorted(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            children.discard(pid)
            ended.append((pid, os.waitstatus_to_exitcode(status)))
    return ended


def end_children(children: set[int]) -> None:
    """Wait for the workers of a driver that is gone to end by themselves, then kill the rest."""
    deadline_s = time.monotonic() + CHILD_GRACE_S
    while children and time.monotonic() < deadline_s:
        ended_children(children)
        time.sleep(0.05)
    for pid in children:
        os.killpg(pid, signal.SIGKILL)


def become_worker(request: dict[str, Any], touched: list[tuple[int, int]]) -> None:
    """Give the forked child what a fresh process has of its own, then run the worker in it.

    Does not return.
    """
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
        from zinfer.worker.run import main

        code = main(Path(request["job_dir"]))
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
    os._exit(0)
