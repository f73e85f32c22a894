"""Tell which part of each weight a rank holds, so that it reads and packs no other.

ZeRO-3 cuts the flat parameter into equal pieces. Of a packed weight the first pieces are codes, and
the last ones are the scales of all rows. So a rank packs the rows of its codes, and the ranks tell
each other the scales.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from zinfer.worker.quantised.packing import Packing

WHOLE_BYTES = 1 << 16
"""Every rank reads tensors up to this size whole: they are mostly latency."""

Gather = Callable[[torch.Tensor], Sequence[torch.Tensor]]
"""Hands bytes to all ranks; returns those of every rank, in their order. Of one length on all."""


@dataclass(frozen=True, kw_only=True)
class Part:
    """The piece of every parameter that this rank holds."""

    rank: int
    ranks: int
    gather: Gather

    def span(self, numel: int, rank: int | None = None) -> tuple[int, int]:
        """Return the first element that a rank holds of so many, and the one after its last."""
        each = -(-numel // self.ranks)
        first = min(numel, each * (self.rank if rank is None else rank))
        return first, min(numel, first + each)

    def rows(self, packing: Packing, dtype: torch.dtype, rank: int | None = None) -> range | None:
        """Return the rows of a packed weight that a rank packs. None: all, for it is small."""
        if packing.bytes <= WHOLE_BYTES:
            return None
        codes = packing.numel // packing.inputs * packing.code_bytes
        span = self.span(packing.stored_numel(dtype), rank)
        first, last = (min(codes, each * dtype.itemsize) for each in span)
        return range(first // packing.code_bytes, -(-last // packing.code_bytes))

    def indices(self, packing: Packing, dtype: torch.dtype) -> range | None:
        """Return the indices of a packed weight's first dimension that hold a rank's rows.

        None: all, for it is small, or its rows run across that dimension.
        """
        rows = self.rows(packing, dtype)
        if rows is None or (len(packing.shape) == 2 and packing.is_transposed):
            return None
        each = packing.outputs if len(packing.shape) > 2 else 1
        return range(rows.start // each, -(-rows.stop // each))

    def slices(self, shape: Sequence[int], dtype: torch.dtype) -> range | None:
        """Return the indices of the first dimension that hold this rank's piece of a plain weight.

        None: all, for it is small.
        """
        numel = math.prod(shape)
        if numel * dtype.itemsize <= WHOLE_BYTES:
            return None
        each = numel // shape[0]
        first, last = self.span(numel)
        return range(first // each, -(-last // each))

    def share_scales(self, packed: torch.Tensor, packing: Packing) -> None:
        """Fill in the scales of the rows that other ranks have packed. All ranks must call it."""
        _, scales = packing.split(packed)
        rows = [self.rows(packing, packed.dtype, rank) for rank in range(self.ranks)]
        known = [each for each in rows if each is not None]
        flat = scales.view(torch.uint8).view(len(scales), -1)
        longest = max(len(each) for each in known)
        mine = known[self.rank]
        sent = torch.zeros(longest, flat.shape[1], dtype=torch.uint8)
        sent[: len(mine)] = flat[mine.start : mine.stop]
        for each, found in zip(known, self.gather(sent), strict=True):
            flat[each.start : each.stop] = found[: len(each)]
