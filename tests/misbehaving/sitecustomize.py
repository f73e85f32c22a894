"""On PYTHONPATH, make workers misbehave after their first timed sample, as batch.seed says.

What breaks is real: a signal, a missing page of memory, a hang.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import os
import signal
import sys
import time
from collections.abc import Sequence
from types import ModuleType
from typing import Any

RAISE, EXIT, SEGFAULT, KILLED, MEMORY, TORCH_MEMORY, HANG, SLEEP = (
    101,
    102,
    103,
    104,
    105,
    106,
    107,
    108,
)


def misbehave(seed: int) -> None:
    """Do what the seed stands for; other seeds do nothing."""
    if seed == RAISE:
        raise RuntimeError("unlucky")
    if seed == EXIT:
        os._exit(3)
    if seed == SEGFAULT:
        os.kill(os.getpid(), signal.SIGSEGV)
    if seed == KILLED:
        os.kill(os.getpid(), signal.SIGKILL)
    if seed == MEMORY:
        bytearray(1 << 46)
    if seed == TORCH_MEMORY:
        import torch

        torch.empty(1 << 46)
    if seed == HANG:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        while True:
            time.sleep(1)
    if seed == SLEEP:
        time.sleep(60)


class Wrapped(importlib.abc.Loader):
    """Loads zinfer.worker.generate, and lets its first timed sample be the last good deed."""

    def __init__(self, loader: importlib.abc.Loader) -> None:
        self._loader = loader

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        self._loader.exec_module(module)
        generate_timed, noted = module.generate_timed, module._noted  # type: ignore[attr-defined]
        chosen: dict[str, Any] = {}

        def generate(engine: Any, prompts: Any, batch: Any, *others: Any) -> Any:
            only_rank = os.environ.get("MISBEHAVING_RANK")
            chosen["seed"] = batch.seed if only_rank in (None, os.environ.get("RANK")) else 0
            return generate_timed(engine, prompts, batch, *others)

        def note(sample: Any, events: Any) -> Any:
            noted(sample, events)
            if sample.kind == "timed":
                misbehave(chosen["seed"])
            return sample

        module.generate_timed, module._noted = generate, note  # type: ignore[attr-defined]


class Finder(importlib.abc.MetaPathFinder):
    """Finds zinfer.worker.generate where it is, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if name != "zinfer.worker.generate":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        assert spec is not None and spec.loader is not None
        spec.loader = Wrapped(spec.loader)
        return spec


sys.meta_path.insert(0, Finder())
