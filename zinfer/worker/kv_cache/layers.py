"""Cache layers whose keys and values live in host memory.

transformers asks a layer three things: how many tokens it has, how long the mask must be, and for
the keys and values to attend to after new ones came (`update`).
"""

from __future__ import annotations

from abc import abstractmethod
from typing import TYPE_CHECKING, Any

import torch
from transformers.cache_utils import CacheLayerMixin

from zinfer.worker.kv_cache.host_tensor import HostKeysOrValues
from zinfer.worker.kv_cache.store import Shape, Stored

if TYPE_CHECKING:
    from zinfer.worker.kv_cache.cache import HostCache

Pair = tuple[torch.Tensor, torch.Tensor]


class SequenceTooLong(ValueError):
    """More tokens came than the cache was made for."""


class HostLayer(CacheLayerMixin):
    """Part that both placements share: the store, and the number of tokens in it."""

    is_compileable = False
    is_croppable = True

    def __init__(self, cache: HostCache, index: int, window: int | None) -> None:
        super().__init__()
        self.cache, self.index, self.window = cache, index, window
        self.is_sliding = window is not None
        self.past = 0
        self.stored: tuple[Stored, Stored] | None = None
        self._made_for: tuple[object, ...] | None = None
        self._waiting: list[tuple[Any, torch.Tensor, torch.Tensor]] = []

    tokens_first = False

    @property
    def capacity(self) -> int:
        """Tokens that the store holds: the window, or the whole sequence."""
        return self.cache.capacity if self.window is None else min(self.window, self.cache.capacity)

    @property
    def token_bytes(self) -> int:
        """Bytes of one token of all rows, keys and values."""
        return 0 if self.stored is None else sum(part.token_bytes for part in self.stored)

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Allocate the store for keys [batch, heads, tokens, dim] and values like these."""
        self.dtype, self.device = key_states.dtype, key_states.device
        self._made_for = _made_for(key_states, value_states)
        batch, heads = key_states.shape[:2]
        stored = []
        for states, format_ in ((key_states, self.cache.keys), (value_states, self.cache.values)):
            shape = Shape(batch=batch, heads=heads, capacity=self.capacity, dim=states.shape[3])
            stored.append(
                Stored(
                    self.cache.memory, shape, states.dtype, format_, tokens_first=self.tokens_first
                )
            )
        self.stored = (stored[0], stored[1])
        self.is_initialized = True

    def get_seq_length(self) -> int:
        """Count the tokens that came so far."""
        return self.past

    def get_max_length(self) -> int:
        """Return how many tokens the layer can attend to."""
        return self.cache.capacity if self.window is None else self.window

    def first_visible(self, past: int) -> int:
        """Return the number of the oldest token that the next one still attends to."""
        return 0 if self.window is None else max(past - self.window + 1, 0)

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Return the length of the mask, and the number of its first token."""
        first = self.first_visible(self.past)
        return self.past - first + query_length, first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> Pair:
        """Store new tokens [batch, heads, tokens, dim]; return what to attend to.

        Raises:
            SequenceTooLong: they go beyond the tokens that the cache was made for.
        """
        past, new = self.past, key_states.shape[2]
        if past + new > self.cache.capacity:
            raise SequenceTooLong(
                f"layer {self.index}: {past} + {new} tokens, and the KV cache was made for "
                f"{self.cache.capacity}"
            )
        if past == 0 and self._made_for not in (None, _made_for(key_states, value_states)):
            self.cache.release()
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.settle()
        if past == 0:  # the prefill attends to what it computed itself
            self.write(key_states, value_states)
            return key_states, value_states
        return self.continued(key_states, value_states)

    @abstractmethod
    def continued(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Store tokens that follow others; return what to attend to."""

    def write(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        """Copy new tokens into the store."""
        assert self.stored is not None
        if key_states.shape[2] > 1:
            self.cache.settle_all_but_last(self)
        for part, states in zip(self.stored, (key_states, value_states), strict=True):
            part.write(states, self.past, self._copy)
        self.past += key_states.shape[2]

    def _copy(self, into: torch.Tensor, source: torch.Tensor) -> None:
        """Copy from the device into a view of a host buffer, beside computation if it can."""
        lanes, memory = self.cache.lanes_of(source.device), self.cache.memory
        if source.device.type != "cpu":
            memory.traffic.to_host_bytes += source.numel() * into.element_size()
        if not lanes.parallel:
            into.copy_(source)
            return
        with lanes.copying():
            order = sorted(range(into.dim()), key=lambda axis: -into.stride(axis))
            place, dense = into.permute(order), source.permute(order).contiguous()
            lanes.used_by_copies(source)
            lanes.used_by_copies(dense)
            if place.is_contiguous() and memory.pin:
                place.copy_(dense, non_blocking=True)
                self._waiting.append((lanes.mark(), place, place))
                return
            staged = memory.staging(dense)
            staged.copy_(dense, non_blocking=True)
            self._waiting.append((lanes.mark(), place, staged))

    @property
    def is_staged(self) -> bool:
        """True while tokens wait in buffers beside the store, which take memory too."""
        return any(staged is not place for _, place, staged in self._waiting)

    def settle(self) -> None:
        """Wait until every copy to the host is complete and in its place."""
        for mark, place, staged in self._waiting:
            if mark is not None:
                mark.synchronize()
            if staged is not place:
                place.copy_(staged)
        self._waiting = []

    def prefill_piece(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Store several tokens that follow others; attend to all visible ones on the device.

        This is rare (a second turn, a prompt in pieces), so the past is copied back at once.
        """
        assert self.stored is not None
        self.settle()
        first = self.first_visible(self.past)
        both = []
        for part, states in zip(self.stored, (key_states, value_states), strict=True):
            past = self.cache.memory.to_device(part.in_order(first, self.past - first), self.device)
            both.append(torch.cat([past.to(self.dtype), states], 2))  # before a window overwrites
        self.write(key_states, value_states)
        self.cache.fetcher.forget(self)
        return both[0], both[1]

    def reset(self) -> None:
        """Forget all tokens; keep the buffers."""
        self.settle()
        self.past = 0
        self.cache.fetcher.forget(self)

    def release(self) -> None:
        """Free the buffers."""
        self.settle()
        self.past, self.stored, self.is_initialized, self._made_for = 0, None, False, None

    def crop(self, tokens_to_remove: int) -> None:
        """Forget the newest tokens.

        Raises:
            ValueError: older tokens of a window have been overwritten.
        """
        self.settle()
        if self.past > self.capacity and tokens_to_remove:
            raise ValueError(f"layer {self.index}: its window has dropped the tokens to go back to")
        self.past = max(self.past - abs(tokens_to_remove), 0)
        self.cache.fetcher.forget(self)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Let row i continue row beam_idx[i]."""
        if self.stored is not None and self.past:
            self.settle()
            for part in self.stored:
                part.reorder(beam_idx.cpu())
            self.cache.fetcher.forget(self)

    def offload(self) -> None:
        """Do nothing: the layer is on the host already."""

    def prefetch(self) -> None:
        """Do nothing: the cache decides what is fetched."""


class FetchedLayer(HostLayer):
    """Placement `host`: the layer's tokens are copied to the device for each step."""

    tokens_first = True

    def continued(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Return all visible tokens on the device, in their order."""
        past, new = self.past, key_states.shape[2]
        first = self.first_visible(past)
        if new > 1:
            return self.prefill_piece(key_states, value_states)
        slot = self.cache.fetcher.get(self, first, past)
        self.write(key_states, value_states)
        count = past - first + 1
        for buffer, states in ((slot.keys, key_states), (slot.values, value_states)):
            buffer[count - 1 : count].copy_(states.movedim(2, 0))
        slot.owner = None
        self.cache.fetcher.prefetch_after(self, slot)
        return slot.keys[:count].movedim(0, 2), slot.values[:count].movedim(0, 2)


class AttendedLayer(HostLayer):
    """Placement `host_attention`: the layer's tokens stay on the host, and attention goes there."""

    def continued(self, key_states: torch.Tensor, value_states: torch.Tensor) -> Pair:
        """Return tensors that say where the tokens are; attention over them runs on the host."""
        if key_states.shape[2] > 1:
            return self.prefill_piece(key_states, value_states)
        self.write(key_states, value_states)
        self.settle()
        return (
            HostKeysOrValues.of(self, self.device, keys=True),
            HostKeysOrValues.of(self, self.device, keys=False),
        )

    @property
    def held(self) -> int:
        """Tokens in the store."""
        return min(self.past, self.capacity)

    def in_slot_order(self, bias: torch.Tensor) -> torch.Tensor:
        """Turn a bias over the visible tokens, oldest first, into the order of the slots."""
        wrapped = self.past % self.capacity if self.past > self.capacity else 0
        return torch.roll(bias, wrapped, -1) if wrapped else bias


def _made_for(keys: torch.Tensor, values: torch.Tensor) -> tuple[object, ...]:
    """Return all that a store depends on beside its capacity."""
    return keys.shape[0], keys.shape[1], keys.shape[3], values.shape[3], keys.dtype, keys.device
