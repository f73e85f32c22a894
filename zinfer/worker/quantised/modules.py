"""Let modules of transformers compute with packed weights, without changing what they are.

A module becomes a subclass of its own class. Its parameter `weight` is gone; `weight_packed` holds
the bytes, and `weight` is computed from them when anybody asks. Linear layers and embeddings never
ask. Experts index their weights and multiply with what comes out: that is a PackedMatrix, which
PyTorch's products know how to use.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import nn
from torch.nn import functional

from zinfer.worker.quantised.packing import Packing, product, rows_of, unpack

SUFFIX = "_packed"
"""Comes after the name of a parameter that is packed."""


class PackedMatrix:
    """One matrix of a packed weight, such as an expert's, for a product."""

    def __init__(self, packed: torch.Tensor, packing: Packing, number: int) -> None:
        self.packed, self.packing, self.number = packed, packing, number

    @property
    def shape(self) -> torch.Size:
        """Return the shape that the model has for it."""
        return torch.Size(self.packing.shape[-2:])

    def plain(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Unpack it."""
        codes, scales = self.packing.matrix(self.packed, self.number)
        rows = torch.cat([codes.flatten(), scales.view(torch.uint8).flatten()])
        one = Packing(
            shape=tuple(self.shape),
            is_transposed=self.packing.is_transposed,
            bits=self.packing.bits,
            group_size=self.packing.group_size,
        )
        return unpack(rows, one, dtype)

    def __rmatmul__(self, x: torch.Tensor) -> torch.Tensor:
        """Multiply, where the model has it as [in, out]."""
        if not self.packing.is_transposed:
            return x @ self.plain(x.dtype)
        return product(x, self.packed, self.packing, number=self.number)

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """Multiply packed where the operation is a product; unpack for any other."""
        if func is functional.linear and isinstance(args[1], cls):
            matrix = args[1]
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            if not matrix.packing.is_transposed:
                return product(args[0], matrix.packed, matrix.packing, bias, matrix.number)
        if func in MATRIX_PRODUCTS and isinstance(args[1], cls):
            return args[1].__rmatmul__(args[0])
        dtype = next((each.dtype for each in args if isinstance(each, torch.Tensor)), torch.float32)
        plain = [each.plain(dtype) if isinstance(each, cls) else each for each in args]
        return func(*plain, **(kwargs or {}))


MATRIX_PRODUCTS = (
    torch.matmul,
    torch.mm,
    torch.Tensor.matmul,
    torch.Tensor.mm,
    torch.Tensor.__matmul__,
)


class PackedExperts:
    """The weights of a layer's experts: indexing yields one expert's."""

    def __init__(self, packed: torch.Tensor, packing: Packing) -> None:
        self._packed, self._packing = packed, packing

    @property
    def shape(self) -> torch.Size:
        """Return [experts, out, in], or [experts, in, out]."""
        return torch.Size(self._packing.shape)

    @property
    def dtype(self) -> torch.dtype:
        """Return the compute type."""
        return self._packed.dtype

    def __getitem__(self, index: int | torch.Tensor) -> PackedMatrix:
        """View one expert's matrix."""
        return PackedMatrix(self._packed, self._packing, int(index))


def quantise_module(module: nn.Module, own_name: str, packing: Packing, dtype: torch.dtype) -> None:
    """Make the module compute with a packed parameter, which has no storage yet.

    Args:
        own_name: of the parameter in its module: weight, or gate_up_proj.
    """
    plain = module._parameters.pop(own_name)
    assert plain is not None and tuple(plain.shape) == packing.shape, (own_name, packing.shape)
    stored = torch.empty(packing.stored_numel(dtype), dtype=dtype, device="meta")
    module.register_parameter(own_name + SUFFIX, nn.Parameter(stored, requires_grad=False))
    packings: dict[str, Packing] = module.__dict__.setdefault("packings", {})
    packings[own_name] = packing
    module.__class__ = _subclass(
        getattr(type(module), "plain_class", type(module)), tuple(packings)
    )


def packed_modules(model: nn.Module) -> list[tuple[str, nn.Module, dict[str, Packing]]]:
    """List every module with packed parameters: its name, itself, own name -> layout."""
    return [
        (name, module, module.packings)
        for name, module in model.named_modules()
        if "packings" in module.__dict__
    ]


def _subclass(plain: type[nn.Module], names: tuple[str, ...]) -> type[nn.Module]:
    """Return the class for modules of class `plain` with these parameters packed, made once."""
    if (plain, names) not in _SUBCLASSES:
        members: dict[str, Any] = {name: property(_reader(name)) for name in names}
        forward = FORWARD.get(plain.__name__) if names == ("weight",) else None
        if forward is not None:
            members["forward"] = forward
        members["plain_class"] = plain
        members["__doc__"] = f"{plain.__name__} with packed weights."
        _SUBCLASSES[plain, names] = type(f"Quantised{plain.__name__}", (plain,), members)
    return _SUBCLASSES[plain, names]


_SUBCLASSES: dict[tuple[type[nn.Module], tuple[str, ...]], type[nn.Module]] = {}


def _reader(name: str) -> Callable[[Any], Any]:
    """Return the getter of a parameter that is packed: experts by index, others as a whole."""

    def read(module: Any) -> Any:
        packing = module.packings[name]
        packed = getattr(module, name + SUFFIX)
        if len(packing.shape) == 3:
            return PackedExperts(packed, packing)
        return unpack(packed, packing, packed.dtype)

    return read


def _linear(module: Any, x: torch.Tensor) -> torch.Tensor:
    """Compute nn.Linear's forward, and that of GPT-2's Conv1D."""
    return product(x, module.weight_packed, module.packings["weight"], module.bias)


def _embedding(module: Any, ids: torch.Tensor) -> torch.Tensor:
    """Unpack the rows of these tokens only."""
    packed = module.weight_packed
    return rows_of(packed, module.packings["weight"], ids, packed.dtype)


FORWARD: dict[str, Callable[..., torch.Tensor]] = {
    "Linear": _linear,
    "Conv1D": _linear,
    "Embedding": _embedding,
}
"""Name of a class -> its forward with a packed weight. Others keep their own."""
