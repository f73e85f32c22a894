"""Find the folder of the compiled ops, and say which of them are there.

Imports neither torch nor deepspeed: the driver asks before it starts a worker.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import platform
import re
import sys
import time
from collections.abc import Iterable, Mapping
from functools import cache
from importlib import metadata, util
from pathlib import Path

from zinfer.machine.native_ops.lock import is_left_over
from zinfer.machine.native_ops.requirements import libaio_elsewhere, scripts_folder
from zinfer.paths import cache_dir


def accelerator_name() -> str:
    """Return `cuda` or `cpu`, as DeepSpeed will find, without importing torch.

    It is `cuda` with a CUDA build of torch and a device that this process may see.
    """
    if chosen := os.environ.get("DS_ACCELERATOR"):
        return chosen
    hidden = os.environ.get("CUDA_VISIBLE_DEVICES", "0") in ("", "-1")
    device_files = glob.glob("/dev/nvidia[0-9]*") + glob.glob("/dev/dxg")
    return "cuda" if torch_cuda_version() and device_files and not hidden else "cpu"


@cache
def torch_cuda_version() -> str | None:
    """Read the CUDA version of torch from its version.py. None: a CPU build, or no torch."""
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
    """Return the folder of the compiled ops: $TORCH_EXTENSIONS_DIR, else one in zinfer's cache.

    Ours is named by versions and processor. The processor counts: DeepSpeed compiles with
    -march=native, and machines may share a home directory.
    """
    if chosen := os.environ.get("TORCH_EXTENSIONS_DIR"):
        return Path(chosen).expanduser().absolute()
    python = f"py{sys.version_info.major}{sys.version_info.minor}"
    accelerator = (
        f"cuda{torch_cuda_version()}" if accelerator_name() == "cuda" else accelerator_name()
    )
    tag = "-".join(
        [
            f"torch{version_of('torch')}",
            f"deepspeed{version_of('deepspeed')}",
            python,
            accelerator,
            _processor(),
        ]
    )
    return cache_dir() / "torch_extensions" / tag


def version_of(distribution: str) -> str:
    """Return the version of an installed distribution, or "none"."""
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return "none"


@cache
def _processor() -> str:
    """Name this processor's instruction sets: architecture, and eight digits for its flags."""
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
    """Return the variables that a process with DeepSpeed needs beyond `environ`.

    They say where the ops are, put ninja on the PATH, and point to a libaio that lies elsewhere.
    """
    given = dict(os.environ if environ is None else environ)
    added = {"TORCH_EXTENSIONS_DIR": str(extensions_dir()), **libaio_elsewhere(given)}
    path = given.get("PATH", os.defpath)
    if scripts_folder() not in path.split(os.pathsep):
        added["PATH"] = scripts_folder() + os.pathsep + path
    return added


def built(op: str) -> bool:
    """Return whether the op was compiled to the end and loaded once.

    A library that a killed linker left behind does not count.
    """
    library, stamp = library_of(op), stamp_of(op)
    try:
        return library.stat().st_size == json.loads(stamp.read_text())["library_bytes"]
    except (OSError, ValueError, KeyError):
        return False


def library_of(op: str) -> Path:
    """Return the path of the op's shared library."""
    return extensions_dir() / op / f"{op}.so"


def stamp_of(op: str) -> Path:
    """Return the path of the note that a finished build leaves."""
    return extensions_dir() / op / "zinfer_built.json"


def stale_lock(op: str) -> Path | None:
    """Return the op's lock file if the build that took it is gone, else None."""
    lock = extensions_dir() / op / "lock"
    return lock if is_left_over(lock) else None


def remove_stale_locks(ops: Iterable[str]) -> list[str]:
    """Remove locks that killed builds left; a sentence for each. Call before loading any op."""
    removed = []
    for op in ops:
        if lock := stale_lock(op):
            age_s = time.time() - lock.stat().st_mtime
            lock.unlink(missing_ok=True)
            removed.append(
                f"removed the lock of a build of {op} that was killed "
                f"({age_s:.0f} s old, held by no process): {lock}"
            )
    return removed
