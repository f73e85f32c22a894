"""A lane whose copies run as late as they may: only when somebody waits for them.

On a GPU copies run beside the computation, on a stream of their own. Here an operator of the copy
lane is noted and its result is garbage until a mark behind it is waited for. Whoever reads a buffer
too early, or overwrites what has yet to be copied, gets wrong numbers.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from zinfer.worker.kv_cache.memory import Lanes, Memory


class LateMark:
    """A point of the lane."""

    def __init__(self, lanes: LateLanes, position: int) -> None:
        self._lanes, self._position = lanes, position

    def synchronize(self) -> None:
        """Run everything up to here."""
        self._lanes.run(self._position)


class LateLanes(Lanes):
    """Lanes of a processor that pretend to be parallel."""

    def __init__(self) -> None:
        super().__init__(torch.device("cpu"))
        self.parallel = True
        self.noted: list[Callable[[], object]] = []
        self.done = 0

    def run(self, position: int) -> None:
        """Run what was noted before `position` and has not run yet, in order."""
        for number in range(self.done, position):
            self.noted[number]()
        self.done = max(self.done, position)

    def copying(self) -> contextlib.AbstractContextManager[object]:
        """Note the operators of the block."""
        return _Noting(self.noted)

    def mark(self) -> Any:
        """Return the point behind all that was noted."""
        return LateMark(self, len(self.noted))

    def computed_after(self, mark: Any) -> None:
        """Let the computation, which runs at once, wait for a point of the lane."""
        if mark is not None:
            mark.synchronize()


class _Noting(TorchDispatchMode):
    def __init__(self, noted: list[Callable[[], object]]) -> None:
        super().__init__()
        self._noted = noted

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func.is_view:
            return func(*args, **kwargs)
        if func._schema.is_mutable:
            self._noted.append(lambda: func(*args, **kwargs))
            return args[0]
        result = func(*args, **kwargs)
        if "empty" in str(func):
            return result
        for tensor in tree_leaves(result):
            tensor.view(torch.uint8).fill_(0x7F) if tensor.is_contiguous() else tensor.zero_()

        def late() -> None:
            for place, value in zip(
                tree_leaves(result), tree_leaves(func(*args, **kwargs)), strict=True
            ):
                place.copy_(value)

        self._noted.append(late)
        return result


class PretendsToPin(Memory):
    """Memory that says that it is page-locked: copies then go straight to their place."""

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a plain host buffer."""
        self.pin = False
        try:
            return super().host(shape, dtype)
        finally:
            self.pin = True

    def staging(self, like: torch.Tensor) -> torch.Tensor:
        """Return a plain buffer."""
        return torch.empty_like(like)
