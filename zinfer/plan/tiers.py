"""The memory plan's values: items of memory, the tiers that hold them, and the plan itself.

A tier is one memory: the device's, the host's, its page-locked part, and the disk. All sizes
are bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass
from enum import StrEnum
from typing import Any, Literal

TierName = Literal["device", "host", "pinned", "disk"]
TIERS: tuple[TierName, ...] = ("device", "host", "pinned", "disk")


class ItemKind(StrEnum):
    """The reason for which memory is taken."""

    WEIGHTS = "weights"
    KV_CACHE = "kv_cache"
    WORKING = "working"
    """States of one forward pass: hidden states, attention scores, logits."""
    STREAMING = "streaming"
    """Copies of weights on their way: gathered, prefetched, staged or dequantised."""
    ALLOCATOR = "allocator"
    """Memory that was freed and that the allocator has not given back."""
    PROCESS = "process"
    """Python, its libraries, kernels and communication."""
    CONTEXT = "context"
    """The GPU's driver and kernels: outside torch's allocator."""
    LOADING = "loading"
    """Copies that only the loader makes."""


class Lifetime(StrEnum):
    """The part of a run during which an item is held."""

    LOADING = "loading"
    RUN = "run"
    GENERATION = "generation"


@dataclass(frozen=True, kw_only=True)
class Item:
    """One use of memory by one rank."""

    name: str
    """For people. Nothing is decided by it."""
    bytes: int
    kind: ItemKind
    lifetime: Lifetime


@dataclass(frozen=True, kw_only=True)
class Tier:
    """The memory that a run needs of one tier, beside what is available."""

    name: TierName
    items: tuple[Item, ...]
    per_rank_bytes: int
    """Sum of the items: one rank."""
    needed_bytes: int
    """The number to compare with available_bytes.

    Covers one rank for a GPU, which no other rank uses, and all ranks for every other tier.
    Includes the tiers named in `includes`.
    """
    available_bytes: int | None
    """Free now, less the headroom. None: unknown, and then never a reason to refuse."""
    includes: tuple[TierName, ...] = ()
    """Tiers that are part of this memory: page-locked memory is host memory. So is the device's
    on a machine without an accelerator."""

    @property
    def fits(self) -> bool:
        """True when the need is at most what is available, or nothing is known of it."""
        return self.available_bytes is None or self.needed_bytes <= self.available_bytes


@dataclass(frozen=True, kw_only=True)
class MemoryPlan:
    """Bytes of one run per tier, before anything is allocated."""

    ranks: int
    tiers: tuple[Tier, ...]
    kv_cache_bytes: int | None
    """All ranks, at the end of a generation. None: the cache of this model is not known."""
    weight_stored_bytes: int
    """All ranks, as stored: quantised weights with their scales."""
    device_is_host: bool
    """The machine has no accelerator: the device's memory is the host's."""
    mapped_checkpoint_bytes: int = 0
    """Bytes by which mapped pages of the checkpoint raise the peak while it is loaded.

    The system drops them when memory runs short, so they are no reason to refuse.
    """
    problems: tuple[str, ...] = ()
    """Reasons why this cannot run although the bytes may fit."""

    @property
    def fits(self) -> bool:
        """True when every tier fits and nothing else stands in the way."""
        return not self.problems and all(tier.fits for tier in self.tiers)

    @property
    def is_checked(self) -> bool:
        """True when the size of at least one needed tier is known."""
        return any(tier.needed_bytes and tier.available_bytes is not None for tier in self.tiers)

    @property
    def peak_host_rss_bytes(self) -> int:
        """Highest resident memory of all ranks' processes, with the device's share if it is host
        memory."""
        return self.tier("host").needed_bytes + self.mapped_checkpoint_bytes

    @property
    def peak_device_bytes(self) -> int | None:
        """Most that torch's allocator hands out, all ranks. None: the device is host memory."""
        if self.device_is_host:
            return None
        device = self.tier("device")
        inside = (item.bytes for item in device.items if item.kind is not ItemKind.CONTEXT)
        return self.ranks * sum(inside)

    def tier(self, name: TierName) -> Tier:
        """Return the tier of that name."""
        return next(tier for tier in self.tiers if tier.name == name)

    def counted_items(self, name: TierName) -> Iterator[Item]:
        """Return the items in the need of this tier, with those of the tiers that it includes."""
        tier = self.tier(name)
        for part in (name, *tier.includes):
            yield from self.tier(part).items

    def document(self) -> dict[str, Any]:
        """Return the plan as JSON-able values."""
        tiers = {tier.name: {**asdict(tier), "fits": tier.fits} for tier in self.tiers}
        return {
            "fits": self.fits,
            "ranks": self.ranks,
            "weight_stored_bytes": self.weight_stored_bytes,
            "problems": list(self.problems),
            "tiers": tiers,
        }
