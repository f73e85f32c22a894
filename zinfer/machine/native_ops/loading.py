"""Give compiled ops to DeepSpeed in this process, so that it compiles nothing in a run."""

from __future__ import annotations

import ctypes
from collections.abc import Iterable
from importlib import util

from zinfer.machine.native_ops.folder import built, library_of


def adopt(ops: Iterable[str]) -> list[str]:
    """Hand DeepSpeed, in this process, the ops that are built. The names of those handed over.

    Without this, DeepSpeed runs a test compilation at the first use of an op in each process, and
    ninja under the lock file. It compiles anew if the virtual environment has another path.
    An op that is not built is left to DeepSpeed. Source: OpBuilder.load in deepspeed 0.19.
    """
    import torch  # noqa: F401  the libraries resolve their symbols in torch's
    from deepspeed.ops.op_builder.builder import OpBuilder

    adopted = []
    for op in ops:
        if op in OpBuilder._loaded_ops or not built(op):
            continue
        spec = util.spec_from_file_location(op, library_of(op))
        assert spec is not None and spec.loader is not None, op
        module = util.module_from_spec(spec)
        spec.loader.exec_module(module)
        if op == "pin_memory":
            ctypes.CDLL(
                str(library_of(op)), mode=ctypes.RTLD_GLOBAL
            )  # as DeepSpeed does: async_io looks for its symbols
        OpBuilder._loaded_ops[op] = module
        adopted.append(op)
    return adopted
