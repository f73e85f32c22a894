"""Holds the imports of a worker ready and forks one for each job of a sweep: a process per job without paying 5-10 s of imports again.

`python -m zinfer.worker.server SOCKET_FD`, started by the driver. The server imports and nothing else: it starts no thread, never
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
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from zinfer.job.messages import CHILD_GRACE_S, MESSAGE_BYTES
from zinfer.machine.mapped_pages import touch, touched_file_ranges
from zinfer.worker.imports import import_everything


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
