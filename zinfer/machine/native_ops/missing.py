"""Say what lacks before ops can be used or compiled here, and what to install."""

from __future__ import annotations

import os
import shlex
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from zinfer.machine.native_ops.folder import (
    accelerator_name,
    built,
    extensions_dir,
    torch_cuda_version,
)
from zinfer.machine.native_ops.requirements import (
    compiler,
    cuda_home,
    has_libaio_runtime,
    has_python_headers,
    install_command,
    missing_of_libaio,
    ninja,
)


def missing_requirements(ops: Sequence[str]) -> list[str]:
    """Say why these ops can neither be used nor built here, each with the command that helps."""
    missing = [op for op in ops if not built(op)]
    if not missing:
        if "async_io" in ops and not has_libaio_runtime():
            return [
                "offload.device=nvme reads through libaio, and libaio.so.1 was not found. "
                f"Install it: {install_command('libaio-dev')}"
            ]
        return []
    what = f"DeepSpeed's {' and '.join(missing)} must be compiled first, and"
    problems = []
    if (reason := _unwritable(extensions_dir())) is not None:
        variable = (
            "TORCH_EXTENSIONS_DIR" if "TORCH_EXTENSIONS_DIR" in os.environ else "ZINFER_CACHE"
        )
        problems.append(
            f"{what} {extensions_dir()} cannot be written ({reason}). "
            f"Set the environment variable {variable} to a folder of yours"
        )
    if compiler() is None:
        problems.append(
            f"{what} no C++ compiler was found on the PATH. Install it: {install_command('g++')}"
        )
    if not has_python_headers():
        problems.append(
            f"{what} Python.h was not found. Install it: {install_command('python3-dev')}"
        )
    if ninja() is None:
        pip = f"{shlex.quote(sys.executable)} -m pip"
        problems.append(f"{what} ninja was not found. Install it: {pip} install ninja")
    if accelerator_name() == "cuda" and cuda_home() is None:
        toolkit = (
            f"Install the CUDA {torch_cuda_version()} toolkit, "
            "or say where it is: export CUDA_HOME=<its folder>"
        )
        problems.append(f"{what} CUDA's headers were not found. {toolkit}")
    if "async_io" in missing and (absent := missing_of_libaio()):
        lacks = f"offload.device=nvme needs libaio, and {' and '.join(absent)} was not found."
        elsewhere = (
            "If it is unpacked elsewhere: "
            "export CFLAGS=-I<folder of libaio.h> LDFLAGS=-L<folder of libaio.so>"
        )
        problems.append(f"{lacks} Install it: {install_command('libaio-dev')}. {elsewhere}")
    return problems


def _unwritable(folder: Path) -> str | None:
    """Say why nothing can be made in a folder, which may be made for it; None: it can."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        os.rmdir(tempfile.mkdtemp(dir=folder))
    except OSError as error:
        return error.strerror
    return None
