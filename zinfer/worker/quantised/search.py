"""Round a weight to few bits so that its products change least.

Rounding each value to its nearest code makes the smallest error in the weight. What counts is the
error in the layer's output, and that depends on what the layer reads. So two things are searched.
First each group's scale and minimum: a narrower range cuts off a few large values and makes the
steps between all others smaller. Then the codes: columns are rounded one after the other, and the
columns that are still to come make up for the error so far. The packed format does not change.

Source: Frantar et al. 2023, GPTQ (arXiv:2210.17323); its scales are those of the weights at the
begin, so that columns can be taken in any order without an index beside the codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn import functional

from zinfer.worker.kv_cache.codes import LARGEST_HALF, SMALLEST_SCALE

RANGES = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
"""Parts of a group's range that are tried for its codes to span."""
REFITS = 1
"""Times that scale and minimum are fitted to the codes which they led to."""
DAMPING = 0.3
"""Added to the diagonal, as a part of its mean.

The inputs of a short text tell little of how other inputs hang together; this makes columns rely
less on each other. GPTQ's percdamp is 0.01, on sixty times as much text. docs/rounding.md has both.
"""
MOST_DAMPING = 1.0
COLUMNS = 128
"""Columns that are rounded before the others hear of their errors, in one product."""
CHUNK_NUMEL = 1 << 16
"""Values whose scales are searched at a time: they stay in the processor's cache."""
ROUNDED_NUMEL = 1 << 25
"""Values of a weight that are rounded at a time, in float32."""


@dataclass(frozen=True, kw_only=True)
class Scheme:
    """Bits of a code, values that share a scale, and how their range lies."""

    bits: int
    group_size: int
    symmetric: bool = False
    """Zero is the code in the middle, and the minimum follows from the scale."""

    @property
    def steps(self) -> int:
        """Return the largest code."""
        return int((1 << self.bits) - 1)

    @property
    def middle(self) -> int:
        """Return the code of zero in a symmetric group."""
        return int(1 << (self.bits - 1))


@dataclass(frozen=True, kw_only=True)
class Inputs:
    """The inputs that a weight was multiplied with over a whole text, as their squares."""

    squares: torch.Tensor
    """[in, in] mean of the product of each two inputs."""

    @property
    def importance(self) -> torch.Tensor:
        """Return the mean square of each input [in]."""
        return self.squares.diagonal()


def round_searched(
    weight: torch.Tensor, scheme: Scheme, inputs: Inputs | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Round a weight for the inputs that it meets.

    Args:
        weight: [out, in] in any floating type. A last group that is not full is filled up.
        inputs: None: nothing is known, all count the same.

    Returns:
        Codes, one a byte [out, groups * group_size], and scales with minima in float16
        [out, groups, 2].
    """
    weight, inputs = _filled_up(weight, inputs, -weight.shape[1] % scheme.group_size)
    out, width = weight.shape
    codes = torch.empty(out, width, dtype=torch.uint8, device=weight.device)
    scales = torch.empty(
        out, width // scheme.group_size, 2, dtype=torch.float16, device=weight.device
    )
    feedback = None if inputs is None else Feedback.of(inputs)
    importance = torch.ones(width, device=weight.device) if inputs is None else inputs.importance
    rows = max(1, ROUNDED_NUMEL // width)
    for start in range(0, out, rows):
        part = slice(start, start + rows)
        values = weight[part].float()
        found = search_scales(values, importance, scheme)
        scales[part] = found
        codes[part] = (
            nearest(values, found, scheme)
            if feedback is None
            else feedback.round(values, found, scheme)
        )
    return codes, scales


def packed(codes: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Put codes, one a byte [out, in], and scales into the bytes that are stored: codes first."""
    if scheme.bits == 4:
        groups = codes.unflatten(-1, (-1, scheme.group_size))
        half = scheme.group_size // 2
        codes = groups[..., :half] | (groups[..., half:] << 4)
    return torch.cat([codes.flatten(), scales.contiguous().view(torch.uint8).flatten()])


def _filled_up(
    weight: torch.Tensor, inputs: Inputs | None, missing: int
) -> tuple[torch.Tensor, Inputs | None]:
    """Repeat the last column until the last group is full; no input ever reaches the copies."""
    if not missing:
        return weight, inputs
    weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    if inputs is not None:
        inputs = Inputs(squares=functional.pad(inputs.squares, (0, missing, 0, missing)))
    return weight, inputs


def search_scales(values: torch.Tensor, importance: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Find each group's scale and minimum [out, groups, 2] in float16, of the smallest error.

    Args:
        values: [out, in] in float32.
        importance: [in] by how much an error in this column counts.
    """
    groups = importance.numel() // scheme.group_size
    counts = importance / importance.mean().clamp_min(1e-30) + 1e-6
    counts = counts.view(groups, scheme.group_size)
    rows = max(1, CHUNK_NUMEL // importance.numel())
    found = [
        _best_scales(part.reshape(-1, scheme.group_size), counts.repeat(len(part), 1), scheme)
        for part in values.split(rows)
    ]
    return torch.cat(found).view(len(values), groups, 2)


def nearest(values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round values [out, in] to the nearest codes, one a byte, for given scales."""
    grouped = values.unflatten(-1, (-1, scheme.group_size))
    scale, least = scales.float().unbind(-1)
    codes = (grouped - least[..., None]).div_(scale[..., None]).round_().clamp_(0, scheme.steps)
    return codes.flatten(-2).to(torch.uint8)


def values_of(codes: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return the float32 values [out, in] that codes, one a byte, stand for."""
    grouped = codes.unflatten(-1, (-1, scheme.group_size)).float()
    scale, least = scales.float().unbind(-1)
    return torch.addcmul(least[..., None], grouped, scale[..., None]).flatten(-2)


def _best_scales(values: torch.Tensor, counts: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Return [groups, 2] of the smallest weighted error, for groups [groups, size]."""
    total = counts.sum(1, keepdim=True)
    best = torch.full_like(total, torch.inf)
    chosen = torch.zeros(len(values), 2, dtype=torch.float16, device=values.device)
    for scale, least in _ranges(values, scheme):
        for _ in range(1 + REFITS):
            codes = (values - least).div_(scale).round_().clamp_(0, scheme.steps)
            error = torch.addcmul(least, codes, scale).sub_(values).square_().mul_(counts)
            error = error.sum(1, keepdim=True)
            is_better = error < best
            best = torch.where(is_better, error, best)
            chosen = torch.where(is_better, torch.cat([scale, least], 1).half(), chosen)
            scale, least = _fitted(values, codes, counts, total, scheme)
    return chosen


def _ranges(values: torch.Tensor, scheme: Scheme) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield scales and minima [groups, 1] that span a part of each group's range."""
    low, high = values.amin(1, keepdim=True), values.amax(1, keepdim=True)
    whole = (high - low) / scheme.steps
    if scheme.symmetric:
        whole = torch.maximum(-low / scheme.middle, high / (scheme.middle - 1))
    for part in RANGES:
        scale = _half(part * whole, scheme)
        yield scale, _minimum(scale, low + (high - low) * ((1 - part) / 2), scheme)


def _fitted(
    values: torch.Tensor,
    codes: torch.Tensor,
    counts: torch.Tensor,
    total: torch.Tensor,
    scheme: Scheme,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fit scale and minimum to codes: the line of least weighted squares through the values."""
    if scheme.symmetric:
        around = codes - scheme.middle
        weighted = around * counts
        up = (weighted * values).sum(1, keepdim=True)
        spread = (weighted * around).sum(1, keepdim=True).clamp_min(1e-20)
        scale = _half(up / spread, scheme)
        return scale, _minimum(scale, scale, scheme)
    weighted = codes * counts
    code = weighted.sum(1, keepdim=True) / total
    value = (values * counts).sum(1, keepdim=True) / total
    spread = (weighted * codes).sum(1, keepdim=True) - code * code * total
    common = (weighted * values).sum(1, keepdim=True) - code * value * total
    scale = _half(common / spread.clamp_min(1e-12), scheme)
    return scale, _minimum(scale, value - scale * code, scheme)


def unreachable(weight: torch.Tensor, scheme: Scheme) -> tuple[int, int] | None:
    """Return row and column of a value that no scale and minimum in float16 reach; None: none.

    Args:
        weight: [out, in] in float32.
    """
    missing = -weight.shape[1] % scheme.group_size
    if missing:
        weight = torch.cat([weight, weight[:, -1:].expand(-1, missing)], 1)
    groups = weight.unflatten(1, (-1, scheme.group_size))
    least, largest = groups.aminmax(dim=-1)
    if scheme.symmetric:
        most = LARGEST_HALF * (scheme.steps - scheme.middle) / scheme.middle
        wrong = (-least > LARGEST_HALF) | (largest > most)
    else:
        wrong = (least.abs() > LARGEST_HALF) | ((largest - least) / scheme.steps > LARGEST_HALF)
    if not wrong.any():
        return None
    row, group = wrong.nonzero()[0].tolist()
    return row, group * scheme.group_size + int(groups[row, group].abs().argmax())


def _half(scale: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round a scale to one that float16 holds, as it does the minimum, in float32."""
    most = LARGEST_HALF / scheme.middle if scheme.symmetric else LARGEST_HALF
    return scale.clamp(SMALLEST_SCALE, most).half().float()


def _minimum(scale: torch.Tensor, least: torch.Tensor, scheme: Scheme) -> torch.Tensor:
    """Round a minimum to one that float16 holds; a symmetric one follows from the scale."""
    if scheme.symmetric:
        least = scale * -scheme.middle
    return least.clamp(-LARGEST_HALF, LARGEST_HALF).half().float()


@dataclass(frozen=True, kw_only=True)
class Feedback:
    """The way in which later columns make up for an error in one column."""

    order: torch.Tensor
    """[in] columns from the most to the least important."""
    spread: torch.Tensor
    """[in, in] upper triangle: the Cholesky factor of the inverse of the ordered squares."""

    @classmethod
    def of(cls, inputs: Inputs) -> Feedback:
        """Invert the squares; a column that no input reached counts as an average one."""
        order = torch.argsort(inputs.importance, descending=True)
        ordered = inputs.squares[order][:, order].float()
        diagonal = ordered.diagonal()
        mean = float(diagonal.mean()) or 1.0
        diagonal[diagonal == 0] = mean
        damping = DAMPING
        while True:
            damped = ordered + torch.eye(len(ordered), device=ordered.device) * damping * mean
            lower, failed = torch.linalg.cholesky_ex(damped)
            if not failed:
                inverse = torch.cholesky_inverse(lower)
                upper, failed = torch.linalg.cholesky_ex(inverse, upper=True)
            if not failed:
                return cls(order=order, spread=upper)
            if damping >= MOST_DAMPING:
                raise ValueError("the inputs of a layer are not numbers, or too large for float32")
            damping *= 10

    def round(self, values: torch.Tensor, scales: torch.Tensor, scheme: Scheme) -> torch.Tensor:
        """Round values [out, in] column by column to codes, one a byte.

        The error of a column, over its own entry of `spread`, is taken off the later columns by
        their entries: then the layer's output changes least.
        """
        left = values[:, self.order].T.contiguous()  # [in, out]: a column is one piece of memory
        group = torch.div(self.order, scheme.group_size, rounding_mode="floor").tolist()
        scale, least = (part.T.contiguous() for part in scales.float().unbind(-1))
        codes = torch.empty(left.shape, dtype=torch.uint8, device=left.device)
        width = len(left)
        own = self.spread.diagonal().tolist()
        for start in range(0, width, COLUMNS):
            stop = min(start + COLUMNS, width)
            errors = torch.empty(stop - start, left.shape[1], device=left.device)
            for column in range(start, stop):
                value, number = left[column], group[column]
                code = (value - least[number]).div_(scale[number]).round_().clamp_(0, scheme.steps)
                codes[column] = code
                error = errors[column - start]
                torch.addcmul(least[number], code, scale[number], out=error)
                torch.sub(value, error, out=error).div_(own[column])
                left[column + 1 : stop].addr_(
                    self.spread[column, column + 1 : stop], error, alpha=-1
                )
            left[stop:].addmm_(self.spread[start:stop, stop:].T, errors, alpha=-1)
        unordered = torch.empty_like(codes)
        unordered[self.order] = codes
        return unordered.T.contiguous()
