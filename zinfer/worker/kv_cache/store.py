"""Keys and values of one layer in host memory, written token by token.

A layer with a window holds only its window: token number i lies in slot i modulo the capacity, so
a new token overwrites the oldest. A layer without one has a slot for every token of the run.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch

from zinfer.worker.kv_cache.codes import dequantise, quantise, quantise_into
from zinfer.worker.kv_cache.kernel import Rows
from zinfer.worker.kv_cache.memory import Memory

Copy = Callable[[torch.Tensor, torch.Tensor], None]
"""Copies its second argument, on the device, into its first, a view of a host buffer."""


@dataclass(frozen=True, kw_only=True)
class Format:
    """Storage format of keys, or of values.

    Attributes:
        bits: 16: as computed, in whatever floating type; 8 or 4: codes with a scale per group.
        group_size: values along the head dimension that share a scale.
        compiled: codes are packed by our C++ kernel where it can pack them.
    """

    bits: int = 16
    group_size: int = 64
    compiled: bool = True


@dataclass(frozen=True, kw_only=True)
class Shape:
    """Sizes of one layer's keys or values."""

    batch: int
    heads: int
    capacity: int
    dim: int


class Stored:
    """Either the keys or the values of one layer.

    With `tokens_first` the buffers are [capacity, batch, heads, ...]: the tokens that go back to
    the device are one contiguous piece. Otherwise they are [batch, heads, capacity, ...]: a head's
    tokens lie together, as attention on the host reads them.
    """

    def __init__(
        self,
        memory: Memory,
        shape: Shape,
        dtype: torch.dtype,
        format_: Format,
        *,
        tokens_first: bool,
    ) -> None:
        self.shape, self.dtype, self.format, self.tokens_first = shape, dtype, format_, tokens_first

        def buffer(width: tuple[int, ...], kind: torch.dtype) -> torch.Tensor:
            lead = (shape.batch, shape.heads)
            places = (shape.capacity, *lead) if tokens_first else (*lead, shape.capacity)
            return memory.host((*places, *width), kind)

        self.parts: tuple[torch.Tensor, ...]
        if format_.bits == 16:
            self.parts = (buffer((shape.dim,), dtype),)
        else:
            codes = buffer((shape.dim * format_.bits // 8,), torch.uint8)
            self.parts = (codes, buffer((shape.dim // format_.group_size, 2), torch.float16))

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of all rows and heads."""
        return sum(part.numel() * part.element_size() for part in self.parts) // self.shape.capacity

    def write(self, new: torch.Tensor, past: int, copy: Copy) -> None:
        """Store new tokens [batch, heads, tokens, dim] that follow `past` others."""
        kept = min(new.shape[2], self.shape.capacity)
        dropped = new.shape[2] - kept
        values = new[:, :, dropped:]
        spans = pieces(past + dropped, kept, self.shape.capacity)
        if self.format.bits < 16 and values.device.type == "cpu":
            self._pack(values, spans)
            return
        packed: tuple[torch.Tensor, ...] = (values,)
        if self.format.bits < 16:  # packed before it is copied, so that fewer bytes move
            packed = quantise(values, self.format.bits, self.format.group_size)
        for slots, tokens in spans:
            for part, source in zip(self.parts, packed, strict=True):
                copy(self._view(part, slots), source[:, :, tokens])

    def _pack(self, values: torch.Tensor, spans: Iterable[tuple[slice, slice]]) -> None:
        """Write codes straight to their place, where the values are in host memory too."""
        how = self.format
        for slots, tokens in spans:
            codes, scales = (self._view(part, slots) for part in self.parts)
            quantise_into(
                values[:, :, tokens], codes, scales, how.bits, how.group_size,
                compiled=how.compiled,
            )  # fmt: skip

    def _view(self, part: torch.Tensor, slots: slice) -> torch.Tensor:
        """View slots of a buffer as [batch, heads, tokens, ...]."""
        if self.tokens_first:
            return part[slots].movedim(0, 2)
        return part[:, :, slots]

    def read(self, first: int, count: int, into: torch.Tensor) -> int:
        """Copy the tokens [first, first + count) in order into a device buffer.

        Args:
            into: [slots, batch, heads, dim].

        Returns:
            The bytes that moved.
        """
        assert self.tokens_first
        for slots, tokens in pieces(first, count, self.shape.capacity):
            if self.format.bits == 16:
                into[tokens].copy_(self.parts[0][slots], non_blocking=True)
                continue
            codes, scales = (part[slots].to(into.device, non_blocking=True) for part in self.parts)
            bits, size = self.format.bits, self.format.group_size
            into[tokens].copy_(dequantise(codes, scales, bits, size, into.dtype))
        return count * self.token_bytes

    def in_order(self, first: int, count: int) -> torch.Tensor:
        """Return the tokens [first, first + count) on the host as [batch, heads, count, dim]."""
        found = []
        for slots, _ in pieces(first, count, self.shape.capacity):
            views = [self._view(part, slots) for part in self.parts]
            if self.format.bits == 16:
                found.append(views[0])
            else:
                bits, size = self.format.bits, self.format.group_size
                found.append(dequantise(views[0], views[1], bits, size, self.dtype))
        return found[0] if len(found) == 1 else torch.cat(found, 2)

    def rows(self) -> Rows:
        """Return the buffers as the host's attention reads them."""
        assert not self.tokens_first
        if self.format.bits == 16:
            return Rows(data=self.parts[0])
        codes, scales = self.parts
        return Rows(
            data=codes, scales=scales, bits=self.format.bits, group_size=self.format.group_size
        )

    def reorder(self, rows: torch.Tensor) -> None:
        """Let row i become what row rows[i] was (beam search)."""
        axis = 1 if self.tokens_first else 0
        for part in self.parts:
            part.copy_(part.index_select(axis, rows))


def pieces(first: int, count: int, capacity: int) -> Iterator[tuple[slice, slice]]:
    """Yield (slots, tokens) of `count` tokens from number `first`: two where they wrap around."""
    assert count <= capacity
    slot = first % capacity
    ahead = min(count, capacity - slot)
    yield slice(slot, slot + ahead), slice(0, ahead)
    if ahead < count:
        yield slice(0, count - ahead), slice(ahead, count)
