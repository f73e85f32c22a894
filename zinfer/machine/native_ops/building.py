"""Compile ops ahead of a run, each in a process of its own.

DeepSpeed would compile an op where it is first used: minutes in the middle of a load, and a lock
file after a killed build for which every later run waits without a word.
"""

from __future__ import annotations

import fcntl
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from zinfer.machine.native_ops.folder import (
    built,
    extensions_dir,
    library_of,
    remove_stale_locks,
    stamp_of,
    version_of,
    worker_environment,
)
from zinfer.machine.native_ops.requirements import compiler
from zinfer.machine.native_ops.table import OPS

GIB = 2**30
COMPILER_BYTES = 2 * GIB
"""Memory to leave for each compiler: one on torch's headers was seen with 1.5 GiB."""
BUILD_LOG = "build.log"
SMALL_OPS = ("deepspeed_shm_comm", "pin_memory")
"""Ops of one or two files: they are compiled side by side, the others with all compilers."""

Echo = Callable[[str], None]


def build(ops: Iterable[str], echo: Echo = print) -> dict[str, float]:
    """Compile the ops that are not built yet. Seconds for each that was compiled.

    One builder at a time for each folder: who comes second waits, says so, and finds them built.

    Raises:
        RuntimeError: an op could not be built.
    """
    missing = [op for op in ops if not built(op)]
    seconds: dict[str, float] = {}
    if missing:
        with _only_builder(missing, echo):
            for message in remove_stale_locks(missing):
                echo(message)
            for together in _groups(op for op in missing if not built(op)):
                seconds |= _build_together(together, echo)
    return seconds


def _groups(ops: Iterable[str]) -> Iterator[list[str]]:
    """Put the small ops into one group, for they have a file or two each; the others go alone."""
    ops = list(ops)
    if small := [op for op in ops if op in SMALL_OPS]:
        yield small
    yield from ([op] for op in ops if op not in SMALL_OPS)


@contextmanager
def _only_builder(ops: list[str], echo: Echo) -> Iterator[None]:
    """Hold the build lock of the folder. The kernel frees it when its holder dies."""
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "zinfer_build.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            holder = lock.read().strip() or "another process"
            echo(f"waiting for {holder}, which builds DeepSpeed's ops in {folder}")
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} ({', '.join(ops)})")
        lock.flush()
        yield


def _build_together(ops: list[str], echo: Echo) -> dict[str, float]:
    """Compile these ops side by side, each in a process of its own. Seconds for each."""
    given = os.environ.get("MAX_JOBS")
    jobs = given or str(max(1, _parallel_compilers() // len(ops)))
    started_s = time.monotonic()
    children = {op: _started(op, jobs, echo) for op in ops}
    seconds: dict[str, float] = {}
    try:
        for op, child in children.items():
            _wait(child, op, started_s, echo)
            _require_built(op, child.returncode)
            seconds[op] = time.monotonic() - started_s
            echo(f"built {op} in {seconds[op]:.0f} s")
    finally:
        for op, child in children.items():
            if child.poll() is None:  # Ctrl-C, or another op failed
                os.killpg(child.pid, signal.SIGKILL)  # with its compilers
                child.wait()
                remove_stale_locks([op])
    return seconds


def _started(op: str, jobs: str, echo: Echo) -> subprocess.Popen[bytes]:
    """Start the process that compiles one op."""
    folder = extensions_dir() / op
    folder.mkdir(parents=True, exist_ok=True)
    echo(
        f"building DeepSpeed's {op} ({OPS[op].purpose}) in {folder}, "
        f"{jobs} compilers at once, log in build.log"
    )
    environment = {**os.environ, **worker_environment(), "MAX_JOBS": jobs}
    if wrapper := _fast_compiler(folder):
        environment["CXX"] = str(wrapper)
    with open(folder / BUILD_LOG, "wb") as output:
        return subprocess.Popen(
            [sys.executable, "-m", "zinfer.machine.native_ops", "compile", op],
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )


def _fast_compiler(folder: Path) -> Path | None:
    """Write a compiler command that leaves out debug information and asks ccache, if it is there.

    DeepSpeed compiles with -g; a later -g0 wins. The code that runs is the same.
    """
    real = compiler()
    if real is None:
        return None
    cached = shutil.which("ccache")
    words = [*([cached] if cached else []), real]
    script = folder / "c++"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(words)} "$@" -g0\n')
    script.chmod(0o755)
    return script


def _require_built(op: str, code: int) -> None:
    """Raise RuntimeError with the last line of the log that says why the op is not there."""
    if code == 0 and built(op):
        return
    log = extensions_dir() / op / BUILD_LOG
    lines = log.read_text(errors="replace").splitlines()
    errors = [line for line in lines if "error" in line.lower()] or ["no line says why"]
    raise RuntimeError(
        f"DeepSpeed's {op} could not be built: {errors[-1][:300]} (all of it in {log})"
    )


def _wait(child: subprocess.Popen[bytes], op: str, started_s: float, echo: Echo) -> None:
    """Wait for the build; twice a minute say how far it is."""
    folder = extensions_dir() / op
    while True:
        try:
            child.wait(timeout=30)
            return
        except subprocess.TimeoutExpired:
            plan = folder / "build.ninja"
            files = plan.read_text().count(".o: ") if plan.exists() else 0
            done = len(list(folder.glob("*.o")))
            age_s = time.monotonic() - started_s
            echo(f"building {op}: {done} of {files or 'unknown'} files compiled, {age_s:.0f} s")


def _parallel_compilers() -> int:
    """Return the number of compilers: one a processor, as far as free memory feeds them."""
    available = re.search(
        r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE
    )
    free_bytes = int(available.group(1)) * 1024 if available else COMPILER_BYTES
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (limit_text := limit.read_text().strip()).isdigit():
        free_bytes = min(free_bytes, int(limit_text))
    return max(1, min(len(os.sched_getaffinity(0)), free_bytes // COMPILER_BYTES))


def compile_here(op: str) -> None:
    """Let DeepSpeed compile and load the op in this process, and leave a stamp that it did."""
    from deepspeed.accelerator import get_accelerator

    builder = get_accelerator().create_op_builder(OPS[op].builder)
    if builder is None or builder.NAME != op:
        raise RuntimeError(
            f"error: DeepSpeed has no {op} for the accelerator {get_accelerator().device_name()}"
        )
    started_s = time.monotonic()
    builder.load(verbose=True)
    seconds = round(time.monotonic() - started_s, 1)
    note = {
        "op": op,
        "library_bytes": library_of(op).stat().st_size,
        "seconds": seconds,
        "deepspeed": version_of("deepspeed"),
    }
    stamp_of(op).write_text(json.dumps(note) + "\n")
