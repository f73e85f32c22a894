"""The raw measurements of a run, as frozen values. Imports nothing heavy."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from zinfer.worker.kv_cache.session import KvUse

from zinfer.worker.energy import Energy
from zinfer.worker.surroundings import Surroundings


@dataclass(frozen=True, kw_only=True)
class Sample:
    """One generation of the whole batch."""

    kind: Literal["warmup", "timed"]
    index: int
    prefill_s: float
    """From the call to the first new token of every row: the time to first token."""
    decode_step_s: tuple[float, ...]
    """One for each further token: new_tokens - 1 of them."""
    total_s: float
    """From the call to the last token: prefill plus all decode steps.

    What generate does after the last token is not in it.
    """


@dataclass(frozen=True, kw_only=True)
class Generation:
    """All samples of a run, and what was generated."""

    samples: tuple[Sample, ...]
    token_ids: tuple[tuple[int, ...], ...]
    """New tokens of this rank's rows, from the last timed generation."""
    yardstick_s: tuple[float, ...]
    """Time of the same fixed work, before each timed generation and after the last."""
    surroundings: Surroundings | None = None
    """What else the machine did during the timed generations."""
    energy: Energy = field(default_factory=Energy)
    """Used in the timed generations."""
    kv_cache_bytes: int | None
    """Bytes of this rank's cache at the end; None where the cache shows no tensors."""
    kv_use: KvUse | None = None
    """This rank's cache in host memory, in the last generation; None for one on the device."""
    streamed_bytes_per_step: float | None = None
    """Weights that this rank gathered, over the passes of the timed generations."""
