"""Count the bytes of everything that a model remembers between two tokens.

Families keep it in many forms: keys and values of layers, convolution and recurrent states in
dicts, linear caches in lists, plain tuples, or attributes of their modules. All of it is counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch

STATE = "state"
"""Part of the names of module attributes that hold what a row has been through."""


def remembered_bytes(model: torch.nn.Module, cache: Any, rows: int) -> int | None:
    """Return the bytes of a cache and of the states that modules keep; None where none shows.

    Each tensor counts once. Counters and lengths, of less than two dimensions, do not.
    """
    tensors = [*_inside(cache, set()), *_module_states(model, rows)]
    sizes = {
        (tensor.data_ptr(), tensor.numel()): tensor.numel() * tensor.element_size()
        for tensor in tensors
        if tensor.dim() >= 2
    }
    return sum(sizes.values()) or None


def _module_states(model: torch.nn.Module, rows: int) -> Iterator[torch.Tensor]:
    """Yield states that modules keep outside the cache, as RecurrentGemma's do: one row each."""
    for module in model.modules():
        for name, value in vars(module).items():
            if STATE in name and isinstance(value, torch.Tensor) and value.shape[:1] == (rows,):
                yield value


def _inside(held: Any, seen: set[int]) -> Iterator[torch.Tensor]:
    """Yield the tensors in containers and in attributes of objects, at any depth."""
    if id(held) in seen:
        return
    seen.add(id(held))
    if isinstance(held, torch.Tensor):
        yield held
    elif isinstance(held, Mapping):
        for each in held.values():
            yield from _inside(each, seen)
    elif isinstance(held, list | tuple | set):
        for each in held:
            yield from _inside(each, seen)
    elif _remembers(held):
        for each in vars(held).values():
            yield from _inside(each, seen)


def _remembers(held: Any) -> bool:
    """Tell whether this object may be part of a cache: no module, function or configuration."""
    computes = isinstance(held, torch.nn.Module | type) or callable(held)
    return hasattr(held, "__dict__") and not computes and not hasattr(held, "model_type")
