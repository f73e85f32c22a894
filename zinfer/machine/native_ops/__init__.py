"""Keep DeepSpeed's compiled ops: what they need, whether they are there, building, loading.

Ops are built ahead (`make setup`, or at the first run that needs one), so that no load waits for a
compiler. What lacks is refused early, with the command to install it.
The driver may import all of this: torch and deepspeed are imported only by the process that
compiles, and by `adopt`, which the worker calls.
"""

from zinfer.machine.native_ops.building import Echo, build
from zinfer.machine.native_ops.folder import (
    accelerator_name,
    built,
    extensions_dir,
    remove_stale_locks,
    stale_lock,
    torch_cuda_version,
    worker_environment,
)
from zinfer.machine.native_ops.loading import adopt
from zinfer.machine.native_ops.missing import missing_requirements
from zinfer.machine.native_ops.table import OPS, NativeOp, all_ops, ops_needed, ops_of

__all__ = [
    "OPS",
    "Echo",
    "NativeOp",
    "accelerator_name",
    "adopt",
    "all_ops",
    "build",
    "built",
    "extensions_dir",
    "missing_requirements",
    "ops_needed",
    "ops_of",
    "remove_stale_locks",
    "stale_lock",
    "torch_cuda_version",
    "worker_environment",
]
