"""Tensors that stand for keys or values on the host, whatever a model does with them.

`update` of a `host_attention` layer returns two of these. transformers' attention interface passes
them to our attention function (routes.py), which reads the layer behind them and never the tensor.
Models that compute attention with operators of their own (BLOOM, MPT, GPT-J, CodeGen) meet
`__torch_function__`: an operator between such a tensor and a device tensor runs on the host, and
its result returns to the device. To the model the tensor seems to be on its own device.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

import torch

from zinfer.worker.kv_cache.kernel import half_compiled

if TYPE_CHECKING:
    from zinfer.worker.kv_cache.layers import AttendedLayer

PRODUCTS = ("matmul", "__matmul__", "bmm", "baddbmm")


class HostKeysOrValues(torch.Tensor):
    """Keys or values of one layer [batch, kv_heads, tokens, dim], or a view of them."""

    layer: AttendedLayer
    home: torch.device
    """Where the model believes the tensor to be."""
    is_keys: bool
    is_whole: bool
    """Not a view, and not yet filled: its data are read from the layer when they are needed."""

    @staticmethod
    def of(layer: AttendedLayer, home: torch.device, *, keys: bool) -> HostKeysOrValues:
        """Stand for all tokens of a layer, without touching them."""
        assert layer.stored is not None
        part = layer.stored[0 if keys else 1]
        shape = (part.shape.batch, part.shape.heads, layer.held, part.shape.dim)
        empty = torch.empty(1, dtype=part.dtype).expand(shape)
        return _wrapped(empty, layer, home, is_keys=keys, is_whole=True)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        """Run an operator that one of these takes part in on the host."""
        kwargs = kwargs or {}
        first = next(_found([*args, *kwargs.values()]))
        name = getattr(func, "__name__", "")
        with torch._C.DisableTorchFunctionSubclass():
            if name == "__get__":  # shape, dtype, device, and the like
                got = func(*args, **kwargs)
                if isinstance(got, torch.device):
                    return first.home
                if not isinstance(got, torch.Tensor):
                    return got
            if (
                name == "scaled_dot_product_attention"
                and (done := _attended(*args, **kwargs)) is not None
            ):
                return done
            return _on_host(func, name, args, kwargs, first)


def _wrapped(
    tensor: torch.Tensor, layer: AttendedLayer, home: torch.device, *, is_keys: bool, is_whole: bool
) -> HostKeysOrValues:
    wrapped = tensor.as_subclass(HostKeysOrValues)
    wrapped.layer, wrapped.home, wrapped.is_keys, wrapped.is_whole = layer, home, is_keys, is_whole
    return wrapped


def _found(values: Any) -> Iterator[HostKeysOrValues]:
    """Yield the host tensors among arguments, also in lists."""
    for value in values:
        if isinstance(value, HostKeysOrValues):
            yield value
        elif isinstance(value, list | tuple):
            yield from _found(value)


def _plain(tensor: HostKeysOrValues) -> torch.Tensor:
    """Return the data of a host tensor."""
    if not tensor.is_whole:
        return tensor.as_subclass(torch.Tensor)
    layer = tensor.layer
    assert layer.stored is not None
    part = layer.stored[0 if tensor.is_keys else 1]
    return part.in_order(layer.past - layer.held, layer.held)


def _on_host(func: Any, name: str, args: Any, kwargs: Any, first: HostKeysOrValues) -> Any:
    """Run on the host; send the result back where a device tensor took part."""
    memory = first.layer.cache.memory
    mixed = False

    def host(value: Any) -> Any:
        nonlocal mixed
        if isinstance(value, HostKeysOrValues):
            return _plain(value)
        if isinstance(value, torch.Tensor):
            mixed = True
            return memory.to_host(value)
        if isinstance(value, torch.device):
            return torch.device("cpu")
        return type(value)(map(host, value)) if isinstance(value, list | tuple) else value

    def stays(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return _wrapped(value, first.layer, first.home, is_keys=first.is_keys, is_whole=False)
        return type(value)(map(stays, value)) if isinstance(value, list | tuple) else value

    given, named = tuple(map(host, args)), {key: host(value) for key, value in kwargs.items()}
    if not mixed:
        return stays(func(*given, **named))
    with _counted(first, given):
        compiles = name in PRODUCTS and first.layer.cache.attention.wanted != "torch"
        result = _product(name, given, named) if compiles else None
        if result is None:
            with _fast_rows(given):
                result = func(*given, **named)
    if name.endswith("_") and not name.endswith("__") and not isinstance(args[0], HostKeysOrValues):
        args[0].copy_(result)
        return args[0]
    return memory.to_device(result, first.home) if isinstance(result, torch.Tensor) else result


@contextlib.contextmanager
def _counted(first: HostKeysOrValues, given: Any) -> Iterator[None]:
    """Add this operator to what attention on the host took."""
    traffic = first.layer.cache.memory.traffic
    started_s = time.perf_counter()
    yield
    traffic.attention_s += time.perf_counter() - started_s
    if first.is_keys:
        traffic.attention_calls += 1
        traffic.attention_bytes += first.layer.held * first.layer.token_bytes


@contextlib.contextmanager
def _fast_rows(given: Any) -> Iterator[None]:
    """Avoid oneDNN for 16-bit products of one row with a strided matrix: it is 5 times slower."""
    if not any(
        isinstance(value, torch.Tensor) and value.dtype == torch.bfloat16 for value in given
    ):
        yield
        return
    with torch.backends.mkldnn.flags(enabled=False):
        yield


def _product(name: str, given: Any, named: Any) -> torch.Tensor | None:
    """Multiply one row per head with keys or values by the kernel; None where it cannot."""
    tensors = [value for value in (*given, *named.values()) if isinstance(value, torch.Tensor)]
    if len(tensors) != (3 if name == "baddbmm" else 2):
        return None
    *biases, row, matrix = tensors
    if (
        row.dim() != matrix.dim()
        or row.dim() < 3
        or row.shape[-2] != 1
        or row.shape[:-2] != matrix.shape[:-2]
    ):
        return None
    scores = matrix.stride(-2) == 1 and matrix.stride(-1) != 1
    rows = matrix.transpose(-1, -2) if scores else matrix
    if rows.dim() > 3:
        if rows.stride(0) != rows.shape[1] * rows.stride(1) or rows.dim() > 4:
            return None
        rows = rows.flatten(0, 1)
    found = half_compiled(row.reshape(rows.shape[0], -1), rows, scores=scores)
    if found is None:
        return None
    result = found.view(*row.shape[:-1], -1)
    for bias in biases:
        result = named.get("beta", 1) * bias.float() + named.get("alpha", 1) * result
    return result.to(row.dtype)


def _attended(
    query: torch.Tensor, key: Any, value: Any, attn_mask: Any = None, *rest: Any, **named: Any
) -> Any:
    """Answer scaled_dot_product_attention over untouched keys and values; None for any other."""
    from zinfer.worker.kv_cache.routes import attend

    whole = isinstance(key, HostKeysOrValues) and isinstance(value, HostKeysOrValues)
    if (
        not whole
        or not (key.is_whole and value.is_whole)
        or query.shape[-2] != 1
        or query.dim() != 4
    ):
        return None
    scale = named.get("scale")
    return attend(query, key.layer, attn_mask, query.shape[-1] ** -0.5 if scale is None else scale)
