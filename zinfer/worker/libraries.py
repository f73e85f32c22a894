"""Load zinfer's compiled kernels, and number element types as all of them do."""

from __future__ import annotations

import ctypes
from functools import cache
from pathlib import Path

import torch

from zinfer.machine.cpp_library import CannotBuild, build_library

KINDS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Element type -> its number in the kernels' structs."""


@cache
def load_library(source: Path) -> ctypes.CDLL | str:
    """Load a kernel, compiling it the first time. Where it cannot be, say why.

    Args:
        source: one of cpp_library.SOURCES.
    """
    try:
        return ctypes.CDLL(str(build_library(source)))
    except (CannotBuild, OSError) as error:
        return str(error)
