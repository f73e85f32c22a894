"""Let linear layers of a model multiply a few rows by our kernel, without changing its code.

A module becomes a subclass of its own class with another forward. Its parameters stay as they are:
under ZeRO-3 they have values only while DeepSpeed has gathered them for this forward.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zinfer.plan.own_products import Shape
from zinfer.worker.skinny.product import SIXTEEN_BITS, own_linear


def use_own_products(model: nn.Module, shapes: Collection[Shape], rows: int) -> int:
    """Let the linear layers of these shapes multiply up to so many rows by our kernel.

    Layers whose class has a forward of its own, as packed ones do, are left alone.

    Returns:
        How many layers do.
    """
    found = [module for module in model.modules() if _is_plain(module) and _shape(module) in shapes]
    for module in found:
        module.own_rows = rows
        module.__class__ = _subclass(type(module))
    return len(found)


@contextmanager
def own_products_up_to(rows: int, model: nn.Module) -> Iterator[None]:
    """Let the layers that have our kernel use it up to so many rows in this block; 0: never."""
    had = {module: module.own_rows for module in model.modules() if hasattr(module, "own_rows")}
    try:
        for module in had:
            module.own_rows = rows
        yield
    finally:
        for module, before in had.items():
            module.own_rows = before


def _is_plain(module: nn.Module) -> bool:
    """Tell if a module computes as nn.Linear does, with a 16-bit weight."""
    weight = module._parameters.get("weight")
    is_linear = isinstance(module, nn.Linear) and type(module).forward is nn.Linear.forward
    return is_linear and weight is not None and weight.dtype in SIXTEEN_BITS


def _shape(module: nn.Module) -> Shape:
    """Return (out, in); a partitioned parameter remembers it."""
    weight: Any = module._parameters["weight"]
    out, inputs = getattr(weight, "ds_shape", weight.shape)
    return out, inputs


def _subclass(plain: type[nn.Module]) -> type[nn.Module]:
    """Return the class for modules of class `plain`, made once."""
    if plain not in _SUBCLASSES:
        members = {"forward": _forward, "__doc__": f"{plain.__name__} with products of our own."}
        _SUBCLASSES[plain] = type(f"Skinny{plain.__name__}", (plain,), members)
    return _SUBCLASSES[plain]


_SUBCLASSES: dict[type[nn.Module], type[nn.Module]] = {}


def _forward(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute nn.Linear's forward."""
    has_few_rows = x.numel() <= module.own_rows * x.shape[-1]
    multiply = own_linear if has_few_rows else functional.linear
    return multiply(x, module.weight, module.bias)
