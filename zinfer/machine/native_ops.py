"""DeepSpeed's compiled ops: what they need, whether they are there, and building them as a step of its own.

DeepSpeed compiles an op where it is first used: minutes in the middle of a load, an error long after the start where libaio or a
compiler is missing, and a `lock` file after a killed build for which every later run waits in silence. So: build ahead (`make setup`),
refuse early, say what is going on.

torch and deepspeed are imported only by the process that compiles, and by `adopt`, which the worker calls.

    python -m zinfer.machine.native_ops build [OP ...]      # what this machine can use, or the ops named
    python -m zinfer.machine.native_ops status
"""

from __future__ import annotations

import argparse
import ctypes
import fcntl
import glob
import hashlib
import json
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import metadata, util
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.config.engines import engine_of
from zinfer.machine.build_lock import is_left_over
from zinfer.machine.build_requirements import (
    compiler,
    cuda_home,
    has_libaio_runtime,
    has_python_headers,
    install_command,
    libaio_elsewhere,
    missing_of_libaio,
    ninja,
    scripts_folder,
)
from zinfer.paths import cache_dir

if TYPE_CHECKING:
    from zinfer.config import RunConfig

GIB = 2**30
COMPILER_BYTES = 2 * GIB  # one compiler on torch's headers was seen with 1.5 GiB

Echo = Callable[[str], None]


@dataclass(frozen=True, kw_only=True)
class NativeOp:
    """One library that DeepSpeed compiles."""

    name: str
    builder: str
    """What DeepSpeed's accelerator calls the class that builds it."""
    accelerators: tuple[str, ...]
    purpose: str


OPS = {
    op.name: op
    for op in (
        NativeOp(
            name="pin_memory",
            builder="PinMemoryBuilder",
            accelerators=("cpu", "cuda"),
            purpose="page-locked host buffers",
        ),
        NativeOp(
            name="async_io",
            builder="AsyncIOBuilder",
            accelerators=("cpu", "cuda"),
            purpose="reads and writes weights on NVMe",
        ),
        NativeOp(
            name="deepspeed_shm_comm",
            builder="ShareMemCommBuilder",
            accelerators=("cpu",),
            purpose="ranks on one CPU machine",
        ),
        NativeOp(
            name="quantizer",
            builder="QuantizerBuilder",
            accelerators=("cuda",),
            purpose="dequantises int4 and int8 in float16",
        ),
        NativeOp(
            name="gds",
            builder="GDSBuilder",
            accelerators=("cuda",),
            purpose="NVMe to GPU without the host (GPUDirect Storage)",
        ),
    )
}


def ops_needed(
    offload_device: str,
    accelerator: str | None = None,
    *,
    quantised_float16: bool = False,
    use_gds: bool = False,
) -> list[str]:
    """The ops that a DeepSpeed run with this offload target loads, in the order in which they must be loaded."""
    kind = accelerator or accelerator_name()
    wanted = {
        "deepspeed_shm_comm": kind
        == "cpu",  # taken up by DeepSpeed's process group, whatever is offloaded
        "pin_memory": offload_device == "nvme",  # async_io resolves its symbols
        "async_io": offload_device == "nvme",
        "gds": offload_device == "nvme" and use_gds,
        "quantizer": kind == "cuda" and quantised_float16,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def ops_of(config: RunConfig) -> list[str]:
    """The ops that this run loads: none for an engine that uses none of DeepSpeed's."""
    if not engine_of(config).loads_ops:
        return []
    return ops_needed(
        config.offload.device,
        quantised_float16=config.dtype.unpacks_to_float16,
        use_gds=config.offload.use_gds,
    )


# Where the ops are kept


def accelerator_name() -> str:
    """`cuda` or `cpu`, as DeepSpeed will find, without importing torch: a CUDA build of torch, and a device that this process may see."""
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    device_files = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/dxg")
    return "cuda" if torch_cuda_version() and device_files and not hidden else "cpu"


@cache
def torch_cuda_version() -> str | None:
    """CUDA version that torch was built for, read from its version.py; None for a CPU build, or without torch."""
    found = util.find_spec("torch")
    if found is None or found.origin is None:
        return None
    match = re.search(
        r"^cuda\b[^=]*=\s*'([^']+)'",
        Path(found.origin).with_name("version.py").read_text(),
        re.MULTILINE,
    )
    return match.group(1) if match else None


def extensions_dir() -> Path:
    """Folder of the built ops: $TORCH_EXTENSIONS_DIR where the user set it, else one of our own for these versions and this processor.

    The processor counts because DeepSpeed compiles with -march=native, and a home directory may be shared between machines.
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).expanduser().absolute()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    accelerator = (
        f"cuda{torch_cuda_version()}" if accelerator_name() == "cuda" else accelerator_name()
    )
    tag = "-".join(
        [
            f"torch{_version('torch')}",
            f"deepspeed{_version('deepspeed')}",
            python,
            accelerator,
            _processor(),
        ]
    )
    return cache_dir() / "torch_extensions" / tag


def _version(distribution: str) -> str:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _processor() -> str:
    """Instruction sets of this processor: the architecture, and eight digits for its list of flags."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    flags = re.search(r"^(?:flags|Features)\s*:(.*)$", text, re.MULTILINE)
    digest = hashlib.sha256(
        " ".join(sorted(flags.group(1).split())).encode() if flags else b""
    ).hexdigest()
    return f"{platform.machine()}_{digest[:8]}"


def worker_environment(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What a process that uses DeepSpeed needs set beyond `environ`: where the ops are, ninja on the PATH, libaio if it lies elsewhere."""
    given = dict(os.environ if environ is None else environ)
    added = {"TORCH_EXTENSIONS_DIR": str(extensions_dir()), **libaio_elsewhere(given)}
    path = given.get("PATH", os.defpath)
    if scripts_folder() not in path.split(os.pathsep):
        added["PATH"] = scripts_folder() + os.pathsep + path
    return added


def missing_requirements(ops: Sequence[str]) -> list[str]:
    """Why these ops can neither be used nor built here: sentences with what to type. Nothing heavy is imported."""
    missing = [op for op in ops if not built(op)]
    if not missing:
        if "async_io" in ops and not has_libaio_runtime():
            return [
                f"offload.device=nvme reads through libaio, and libaio.so.1 was not found. Install it: {install_command('libaio-dev')}"
            ]
        return []
    what = f"DeepSpeed's {' and '.join(missing)} must be compiled first, and"
    problems = []
    if compiler() is None:
        problems.append(
            f"{what} no C++ compiler was found on the PATH. Install it: {install_command('g++')}"
        )
    if not has_python_headers():
        problems.append(
            f"{what} Python.h was not found. Install it: {install_command('python3-dev')}"
        )
    if ninja() is None:
        problems.append(
            f"{what} ninja was not found. Install it: {shlex.quote(sys.executable)} -m pip install ninja"
        )
    if accelerator_name() == "cuda" and cuda_home() is None:
        toolkit = f"Install the CUDA {torch_cuda_version()} toolkit, or say where it is: export CUDA_HOME=<its folder>"
        problems.append(f"{what} CUDA's headers were not found. {toolkit}")
    if "async_io" in missing and (absent := missing_of_libaio()):
        lacks = f"offload.device=nvme needs libaio, and {' and '.join(absent)} was not found."
        elsewhere = "If it is unpacked elsewhere: export CFLAGS=-I<folder of libaio.h> LDFLAGS=-L<folder of libaio.so>"
        problems.append(f"{lacks} Install it: {install_command('libaio-dev')}. {elsewhere}")
    return problems


# What is there


def built(op: str) -> bool:
    """Whether the op was compiled to the end and loaded once. A library that a killed linker left behind is not counted."""
    library, stamp = _library(op), _stamp(op)
    try:
        return library.stat().st_size == json.loads(stamp.read_text())["library_bytes"]
    except (OSError, ValueError, KeyError):
        return False


def _library(op: str) -> Path:
    return extensions_dir() / op / f"{op}.so"


def _stamp(op: str) -> Path:
    return extensions_dir() / op / "zinfer_built.json"


def stale_lock(op: str) -> Path | None:
    """The op's lock file if the build that took it is gone, else None."""
    lock = extensions_dir() / op / "lock"
    return lock if is_left_over(lock) else None


def remove_stale_locks(ops: Iterable[str]) -> list[str]:
    """Take away what killed builds left behind; a sentence for each. To be called before anything loads the ops."""
    removed = []
    for op in ops:
        if lock := stale_lock(op):
            age_s = time.time() - lock.stat().st_mtime
            lock.unlink(missing_ok=True)
            removed.append(
                f"removed the lock of a build of {op} that was killed ({age_s:.0f} s old, held by no process): {lock}"
            )
    return removed


# Building


def build(ops: Iterable[str], echo: Echo = print) -> dict[str, float]:
    """Compile the ops that are not built yet, one after the other; seconds for each that was compiled.

    One builder at a time for each folder: who comes second waits, says so, and finds them built.
    """
    missing = [op for op in ops if not built(op)]
    seconds = {}
    if missing:
        with _only_builder(missing, echo):
            for message in remove_stale_locks(missing):
                echo(message)
            for op in missing:
                if not built(op):
                    seconds[op] = _build_one(op, echo)
    return seconds


@contextmanager
def _only_builder(ops: list[str], echo: Echo) -> Iterator[None]:
    """Hold the folder's build lock: the kernel's own, which goes when its holder dies."""
    folder = extensions_dir()
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / "zinfer_build.lock", "a+") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            lock.seek(0)
            echo(
                f"waiting for {lock.read().strip() or 'another process'}, which builds DeepSpeed's ops in {folder}"
            )
            fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write(f"process {os.getpid()} ({', '.join(ops)})")
        lock.flush()
        yield


def _build_one(op: str, echo: Echo) -> float:
    """Compile one op in a process of its own. Seconds."""
    folder = extensions_dir() / op
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / "build.log"
    jobs = os.environ.get("MAX_JOBS") or str(_parallel_compilers())
    echo(
        f"building DeepSpeed's {op} ({OPS[op].purpose}) in {folder}, {jobs} compilers at once, log in build.log"
    )
    environment = {**os.environ, **worker_environment(), "MAX_JOBS": jobs}
    started_s = time.monotonic()
    with open(log, "wb") as output:
        command = [sys.executable, "-m", "zinfer.machine.native_ops", "compile", op]
        child = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env=environment,
            start_new_session=True,
        )
        try:
            _wait(child, op, folder, started_s, echo)
        except BaseException:
            os.killpg(child.pid, signal.SIGKILL)  # with its compilers
            child.wait()
            remove_stale_locks([op])
            raise
    if child.returncode != 0 or not built(op):
        errors = [
            line for line in log.read_text(errors="replace").splitlines() if "error" in line.lower()
        ] or ["no line says why"]
        raise RuntimeError(
            f"DeepSpeed's {op} could not be built: {errors[-1][:300]} (all of it in {log})"
        )
    seconds = time.monotonic() - started_s
    echo(f"built {op} in {seconds:.0f} s")
    return seconds


def _wait(
    child: subprocess.Popen[bytes], op: str, folder: Path, started_s: float, echo: Echo
) -> None:
    """Wait for the build; twice a minute say how far it is."""
    while True:
        try:
            child.wait(timeout=30)
            return
        except subprocess.TimeoutExpired:
            plan = folder / "build.ninja"
            files = plan.read_text().count(".o: ") if plan.exists() else 0
            done = len(list(folder.glob("*.o")))
            echo(
                f"building {op}: {done} of {files or 'unknown'} files compiled, {time.monotonic() - started_s:.0f} s"
            )


def _parallel_compilers() -> int:
    """As many as there are processors, but no more than the free memory feeds."""
    available = re.search(
        r"^MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text(), re.MULTILINE
    )
    free_bytes = int(available.group(1)) * 1024 if available else COMPILER_BYTES
    limit = Path("/sys/fs/cgroup/memory.max")
    if limit.exists() and (limit_text := limit.read_text().strip()).isdigit():
        free_bytes = min(free_bytes, int(limit_text))
    return max(1, min(len(os.sched_getaffinity(0)), free_bytes // COMPILER_BYTES))


def _compile(op: str) -> None:
    """Let DeepSpeed compile and load the op in this process, and note that it did."""
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
        "library_bytes": _library(op).stat().st_size,
        "seconds": seconds,
        "deepspeed": _version("deepspeed"),
    }
    _stamp(op).write_text(json.dumps(note) + "\n")


def adopt(ops: Iterable[str]) -> list[str]:
    """Hand DeepSpeed, in this process, the ops that are built; the names of those it was given.

    Without this, the first use of an op in each process runs a test compilation, and ninja under the lock file, and compiles anew if the
    virtual environment has another path. An op that is not built is left to DeepSpeed. Source: OpBuilder.load in deepspeed 0.19.
    """
    import torch  # noqa: F401  the libraries resolve their symbols in torch's
    from deepspeed.ops.op_builder.builder import OpBuilder

    adopted = []
    for op in ops:
        if op in OpBuilder._loaded_ops or not built(op):
            continue
        spec = util.spec_from_file_location(op, _library(op))
        assert spec is not None and spec.loader is not None, op
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if op == "pin_memory":
            ctypes.CDLL(
                str(_library(op)), mode=ctypes.RTLD_GLOBAL
            )  # as DeepSpeed does: async_io looks for its symbols
        OpBuilder._loaded_ops[op] = module
        adopted.append(op)
    return adopted


# Command line


def default_ops() -> list[str]:
    """What runs here may load, without the ones that are asked for by name: quantizer and gds."""
    return ops_needed("nvme")


def main(arguments: list[str] | None = None) -> int:
    """`build`, `status`, and `compile`, which `build` runs for each op."""
    parser = argparse.ArgumentParser(
        prog="python -m zinfer.machine.native_ops", description="DeepSpeed's compiled ops"
    )
    parser.add_argument("action", choices=["build", "status", "compile"])
    parser.add_argument(
        "ops",
        nargs="*",
        metavar="OP",
        help=f"default: {', '.join(default_ops())}; all: {', '.join(OPS)}",
    )
    given = parser.parse_args(arguments)
    if unknown := [op for op in given.ops if op not in OPS]:
        parser.error(f"there is no op {', '.join(unknown)}. Choose from: {', '.join(OPS)}")
    ops = given.ops or default_ops()
    if given.action == "compile":
        for op in ops:
            _compile(op)
        return 0
    if given.action == "status":
        print(f"ops in {extensions_dir()}")
        for op in given.ops or OPS:
            lock = stale_lock(op)
            print(
                f"  {op:20} {'built' if built(op) else 'not built':10} {OPS[op].purpose}{f'; stale lock {lock}' if lock else ''}"
            )
        print("\n".join(missing_requirements(default_ops())))
        return 0
    return _build_command(ops)


def _build_command(ops: list[str]) -> int:
    """Build what can be built here. For the rest print what is missing; runs that need it are refused with the same words."""
    problems = missing_requirements(default_ops())
    for problem in problems:
        print(problem)
    if problems:
        ops = (
            []
            if missing_requirements(ops_needed("none"))
            else [op for op in ops if op != "async_io"]
        )
    try:
        seconds = build(ops, echo=lambda line: print(line, flush=True))
    except RuntimeError as error:
        print(error, file=sys.stderr)
        return 1
    print(
        f"DeepSpeed's ops are in {extensions_dir()}: {', '.join(ops)}"
        + ("" if seconds else " (nothing to build)")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
