"""Turn an exception into the status and the reason that a run ends with."""

from __future__ import annotations

from typing import Any

from zinfer.config import ConfigError
from zinfer.job.outcome import Status
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.plan.fit import DoesNotFit

HOST_MEMORY_SIGNS = (
    "can't allocate memory",
    "cannot allocate memory",
    "not enough memory",
    "mlock",
    "bad_alloc",
)
"""Words of torch, libstdc++ and DeepSpeed for host memory, or a limit on it, that is used up."""


def failure(error: BaseException) -> tuple[Status, str]:
    """Return the status and the reason. A refusal is known without importing torch."""
    if isinstance(error, DoesNotFit):
        return "does_not_fit", str(error)
    if isinstance(error, ConfigError):
        return "refused", str(error)
    if isinstance(error, WrongWeights):
        return "error", str(error)
    said = str(error).strip()
    first = said.splitlines()[0] if said else type(error).__name__
    if _is_device_memory(error):
        return "oom_device", first
    if isinstance(error, MemoryError) or any(sign in said.lower() for sign in HOST_MEMORY_SIGNS):
        return "oom_host", f"host memory ran out: {first}"
    return "error", f"{type(error).__name__}: {first}"


def failed_event(error: BaseException, traceback: str) -> dict[str, Any]:
    """Return the fields of the `failed` event."""
    status, reason = failure(error)
    problems = error.problems if isinstance(error, ConfigError) else []
    return {"status": status, "reason": reason, "problems": problems, "traceback": traceback}


def _is_device_memory(error: BaseException) -> bool:
    if not isinstance(error, RuntimeError):  # torch's OutOfMemoryError is one
        return False
    import torch

    return isinstance(error, torch.OutOfMemoryError)
