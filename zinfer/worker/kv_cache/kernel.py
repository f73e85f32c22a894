"""Compute decode attention on the host: with our own C++ kernel, or with PyTorch where it is not.

Decode attention has one query token per row. It reads every key and value once, so memory
bandwidth is its limit. PyTorch's attention on a CPU reaches a tenth to a half of that bandwidth
(docs/kv_cache.md has the table), the kernel three quarters.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

import torch

from zinfer.machine.cpp_library import DECODE_ATTENTION
from zinfer.plan.kv_placement import (
    KERNEL_DIM_MULTIPLE,
    KERNEL_GROUP_MULTIPLE,
    KERNEL_LARGEST_DIM,
)
from zinfer.worker.kv_cache.codes import dequantise
from zinfer.worker.libraries import KINDS, load_library

MASKED = -1e30
"""Added to the score of a token that must not be seen. Finite, so that no row becomes NaN."""
CODE_KINDS = {8: 3, 4: 4}


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Keys or values of one layer on the host.

    Attributes:
        data: [batch, kv_heads, capacity, dim] in a floating type, or codes [..., dim * bits / 8].
        scales: [batch, kv_heads, capacity, dim / group_size, 2] in float16; None for floats.
        bits: 16 for floats of any width, 8 or 4 for codes.
    """

    data: torch.Tensor
    scales: torch.Tensor | None = None
    bits: int = 16
    group_size: int = 0

    @property
    def dim(self) -> int:
        """Values of one head and token."""
        return self.data.shape[-1] * (8 // self.bits if self.bits < 16 else 1)

    def as_floats(self, tokens: int, dtype: torch.dtype) -> torch.Tensor:
        """Return the first `tokens` tokens as [batch, kv_heads, tokens, dim]."""
        data = self.data[:, :, :tokens]
        if self.scales is None:
            return data
        return dequantise(data, self.scales[:, :, :tokens], self.bits, self.group_size, dtype)


@dataclass(frozen=True, kw_only=True)
class Scoring:
    """Settings that turn the product of a query and keys into weights.

    Attributes:
        scale: factor of the product, usually head_dim ** -0.5.
        bias: float32 [batch or 1, heads or 1, tokens] added to the scores; None: nothing is masked.
        sinks: float32 [heads], scores that take part in the softmax without a value (gpt-oss).
        softcap: scores become softcap * tanh(score / softcap) (Gemma 2); None: they stay.
    """

    scale: float
    bias: torch.Tensor | None = None
    sinks: torch.Tensor | None = None
    softcap: float | None = None


class _Problem(ctypes.Structure):
    """The struct Problem of decode_attention.cpp, field by field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("q", "k", "v", "k_scales", "v_scales")),
        *((name, ctypes.c_void_p) for name in ("bias", "sinks", "out")),
        *((name, ctypes.c_int64) for name in ("batch", "kv_heads", "group", "head_dim")),
        *((name, ctypes.c_int64) for name in ("value_dim", "tokens", "capacity")),
        *((name, ctypes.c_int64) for name in ("k_group", "v_group")),
        *((name, ctypes.c_int64) for name in ("bias_batch_stride", "bias_head_stride")),
        *((name, ctypes.c_int32) for name in ("k_kind", "v_kind", "threads")),
        ("softcap", ctypes.c_float),
        ("scale", ctypes.c_float),
    ]


library = partial(load_library, DECODE_ATTENTION)
"""Return the compiled kernel, or why there is none."""


def unsupported(keys: Rows, values: Rows) -> str | None:
    """Say why the compiled kernel cannot read these keys and values; None where it can."""
    for name, rows in (("keys", keys), ("values", values)):
        if rows.dim % KERNEL_DIM_MULTIPLE or rows.dim > KERNEL_LARGEST_DIM:
            allowed = f"no multiple of {KERNEL_DIM_MULTIPLE} up to {KERNEL_LARGEST_DIM}"
            return f"{name} have {rows.dim} values a head: {allowed}"
        least = KERNEL_GROUP_MULTIPLE[rows.bits]
        if rows.bits < 16 and rows.group_size % least:
            size = f"groups of {rows.group_size}, no multiple of {least}"
            return f"{name} in {rows.bits} bits have {size}"
        if rows.bits == 16 and rows.data.dtype not in KINDS:
            return f"{name} are {rows.data.dtype}"
    return None


def compiled(
    query: torch.Tensor, keys: Rows, values: Rows, tokens: int, scoring: Scoring
) -> torch.Tensor:
    """Attend with the C++ kernel. Arguments and result as those of `attend`."""
    lib = library()
    assert isinstance(lib, ctypes.CDLL), lib
    batch, heads, head_dim = query.shape
    kv_heads, capacity = keys.data.shape[1:3]
    assert keys.data.is_contiguous() and values.data.is_contiguous()
    wide = query.float().contiguous()
    out = torch.empty(batch, heads, values.dim)
    bias = None if scoring.bias is None else scoring.bias[..., :tokens].float()
    if bias is not None and bias.stride(-1) != 1:
        bias = bias.contiguous()
    sinks = None if scoring.sinks is None else scoring.sinks.float().contiguous()
    problem = _Problem(
        q=wide.data_ptr(),
        k=keys.data.data_ptr(),
        v=values.data.data_ptr(),
        k_scales=None if keys.scales is None else keys.scales.data_ptr(),
        v_scales=None if values.scales is None else values.scales.data_ptr(),
        bias=None if bias is None else bias.data_ptr(),
        sinks=None if sinks is None else sinks.data_ptr(),
        out=out.data_ptr(),
        batch=batch,
        kv_heads=kv_heads,
        group=heads // kv_heads,
        head_dim=head_dim,
        value_dim=values.dim,
        tokens=tokens,
        capacity=capacity,
        k_group=keys.group_size,
        v_group=values.group_size,
        bias_batch_stride=bias.stride(0) if bias is not None and bias.shape[0] > 1 else 0,
        bias_head_stride=bias.stride(1) if bias is not None and bias.shape[1] > 1 else 0,
        k_kind=CODE_KINDS[keys.bits] if keys.bits < 16 else KINDS[keys.data.dtype],
        v_kind=CODE_KINDS[values.bits] if values.bits < 16 else KINDS[values.data.dtype],
        threads=torch.get_num_threads(),
        softcap=scoring.softcap or 0.0,
        scale=scoring.scale,
    )
    if lib.zinfer_decode_attention(ctypes.byref(problem)) != 0:
        raise ValueError(f"the kernel refused this problem: {unsupported(keys, values)}")
    return out.to(query.dtype)


def half_compiled(
    vectors: torch.Tensor, rows: torch.Tensor, *, scores: bool
) -> torch.Tensor | None:
    """Compute one half of attention alone with the C++ kernel.

    Models that do not use transformers' attention interface (BLOOM, MPT, GPT-J) multiply queries
    with keys, and weights with values, themselves.

    Args:
        vectors: queries [items, dim] for scores, weights [items, tokens] otherwise.
        rows: keys or values [items, tokens, dim] in a floating type, a head's tokens contiguous.

    Returns:
        float32 scores [items, tokens], or sums [items, dim]; None where the kernel cannot.
    """
    items, tokens, dim = rows.shape
    lib = library()
    fits = rows.stride(2) == 1 and rows.stride(1) == dim and rows.stride(0) % dim == 0
    if (
        not isinstance(lib, ctypes.CDLL)
        or not fits
        or rows.dtype not in KINDS
        or dim % KERNEL_DIM_MULTIPLE
    ):
        return None
    given = vectors.float().contiguous()
    out = torch.empty(items, tokens if scores else dim)
    pointers = [ctypes.c_void_p(tensor.data_ptr()) for tensor in (given, rows, out)]
    sizes = [ctypes.c_int64(size) for size in (items, dim, tokens, rows.stride(0) // dim)]
    threads = ctypes.c_int32(torch.get_num_threads())
    refused = lib.zinfer_attention_half(int(scores), KINDS[rows.dtype], *pointers, *sizes, threads)
    return None if refused else out


def by_products(
    query: torch.Tensor, keys: Rows, values: Rows, tokens: int, scoring: Scoring
) -> torch.Tensor:
    """Attend with two batched matrix products. Arguments and result as those of `attend`."""
    batch, heads, head_dim = query.shape
    dtype = keys.data.dtype if keys.bits == 16 else torch.float32
    k, v = keys.as_floats(tokens, dtype), values.as_floats(tokens, dtype).to(dtype)
    kv_heads = k.shape[1]
    grouped = (
        (query.float() * scoring.scale).to(dtype).view(batch, kv_heads, heads // kv_heads, head_dim)
    )
    # oneDNN's 16-bit product of one row with a strided matrix is 5 to 10 times slower than ATen's.
    with torch.backends.mkldnn.flags(enabled=dtype == torch.float32):
        scores = torch.matmul(grouped, k.transpose(-1, -2)).float()
        weights = _weights(scores.view(batch, heads, tokens), scoring, tokens)
        out = torch.matmul(weights.view_as(scores).to(dtype), v)
    return out.reshape(batch, heads, -1).to(query.dtype)


def by_sdpa(
    query: torch.Tensor, keys: Rows, values: Rows, tokens: int, scoring: Scoring
) -> torch.Tensor:
    """Attend with PyTorch's scaled_dot_product_attention; the heads of a group are its rows.

    Sinks and softcap are beyond it: such problems go to `by_products`.
    """
    if scoring.sinks is not None or scoring.softcap is not None:
        return by_products(query, keys, values, tokens, scoring)
    batch, heads, head_dim = query.shape
    dtype = keys.data.dtype if keys.bits == 16 else torch.float32
    k, v = keys.as_floats(tokens, dtype), values.as_floats(tokens, dtype).to(dtype)
    kv_heads = k.shape[1]
    grouped = query.to(dtype).view(batch, kv_heads, heads // kv_heads, head_dim)
    mask = None
    if scoring.bias is not None:
        bias = scoring.bias[..., :tokens].expand(
            -1, heads if scoring.bias.shape[1] > 1 else kv_heads, -1
        )
        rows = (heads if scoring.bias.shape[1] > 1 else kv_heads) // kv_heads
        mask = bias.unflatten(1, (kv_heads, rows)).to(dtype)
    out = torch.nn.functional.scaled_dot_product_attention(
        grouped, k, v, attn_mask=mask, scale=scoring.scale
    )
    return out.reshape(batch, heads, -1).to(query.dtype)


def _weights(scores: torch.Tensor, scoring: Scoring, tokens: int) -> torch.Tensor:
    """Compute the softmax of float32 scores [batch, heads, tokens]."""
    if scoring.softcap is not None:
        scores = scoring.softcap * torch.tanh(scores / scoring.softcap)
    if scoring.bias is not None:
        scores = (scores + scoring.bias[..., :tokens]).clamp_min(MASKED)
    if scoring.sinks is None:
        return torch.softmax(scores, -1)
    sinks = scoring.sinks.float().view(1, -1, 1).expand(scores.shape[0], -1, 1)
    return torch.softmax(torch.cat([scores, sinks], -1), -1)[..., :-1]


Formulation = Callable[[torch.Tensor, Rows, Rows, int, Scoring], torch.Tensor]
FORMULATIONS: dict[str, Formulation] = {"products": by_products, "sdpa": by_sdpa}
TRIES, TRIED_TOKENS = 5, 512


@dataclass
class HostAttention:
    """Decode attention on the host in the formulation that suits this machine and these shapes.

    Attributes:
        wanted: `auto` (compiled where possible), `compiled`, or `torch`.
        said: how each kind of layer is computed, for the log; filled as layers come.
    """

    wanted: str = "auto"
    said: dict[str, str] = field(default_factory=dict)
    _chosen: dict[tuple[object, ...], Formulation] = field(default_factory=dict)

    def attend(
        self, query: torch.Tensor, keys: Rows, values: Rows, tokens: int, scoring: Scoring
    ) -> torch.Tensor:
        """Attend over the first `tokens` tokens of a layer's keys and values.

        Args:
            query: [batch, heads, head_dim], one token of each row, on the host.

        Returns:
            [batch, heads, value_dim] in the query's dtype.
        """
        key = (query.shape, keys.data.dtype, keys.bits, values.bits, keys.group_size)
        chosen = self._chosen.get(key)
        if chosen is None:
            chosen = self._chosen[key] = self._choose(query, keys, values)
        return chosen(query, keys, values, tokens, scoring)

    def _choose(self, query: torch.Tensor, keys: Rows, values: Rows) -> Formulation:
        heads, kv_heads = query.shape[1], keys.data.shape[1]
        kind = (
            f"{keys.data.dtype}".removeprefix("torch.") if keys.bits == 16 else f"{keys.bits} bits"
        )
        name = f"{heads} query heads on {kv_heads} KV heads, {kind}"
        problem = (
            "kv_cache.kernel=torch was set" if self.wanted == "torch" else unsupported(keys, values)
        )
        lib = None if problem else library()
        if problem is None and isinstance(lib, ctypes.CDLL):
            self.said[name] = f"compiled kernel, vectors of {lib.zinfer_vector_bits()} bits"
            return compiled
        problem = problem or str(lib)
        if self.wanted == "compiled":
            raise ValueError(f"kv_cache.kernel=compiled: {problem}. Set kv_cache.kernel=auto")
        times = {
            formulation: _time_s(FORMULATIONS[formulation], query, keys, values)
            for formulation in FORMULATIONS
        }
        best = min(times, key=lambda formulation: times[formulation])
        self.said[name] = f"PyTorch ({best}), because {problem}"
        return FORMULATIONS[best]


def _time_s(formulation: Formulation, query: torch.Tensor, keys: Rows, values: Rows) -> float:
    """Time one call on the first tokens of these very buffers; the least of a few tries."""
    tokens = min(TRIED_TOKENS, keys.data.shape[2])
    times = []
    for _ in range(TRIES):
        started_s = time.perf_counter()
        formulation(query, keys, values, tokens, Scoring(scale=1.0))
        times.append(time.perf_counter() - started_s)
    return min(times)
