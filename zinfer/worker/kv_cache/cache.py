"""The cache that a model gets: one layer object per layer, on the host or on the device."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import torch
from transformers import PretrainedConfig
from transformers.cache_utils import (
    DYNAMIC_LAYER_TYPE_MAPPING,
    Cache,
    get_layer_types_and_kwargs,
)

from zinfer.worker.kv_cache.kernel import HostAttention
from zinfer.worker.kv_cache.layers import AttendedLayer, FetchedLayer, HostLayer
from zinfer.worker.kv_cache.memory import Lanes, Memory
from zinfer.worker.kv_cache.routes import bias_from
from zinfer.worker.kv_cache.store import Format

MOVABLE = frozenset({"full_attention", "sliding_attention", "chunked_attention"})
"""Layer types, as transformers names them, that keep keys and values and nothing else.
Every other layer (recurrent states, compressed caches) stays on the device."""


class HostCache(Cache):
    """A transformers cache whose attention layers live in host memory.

    Attributes:
        capacity: tokens of one row, prompt and new ones.
        keys, values: how each is stored.
        memory: buffers and traffic, in bytes.
        attention: how attention on the host is computed.
    """

    def __init__(
        self,
        config: PretrainedConfig,
        *,
        capacity: int,
        placement: Literal["host", "host_attention"],
        keys: Format | None = None,
        values: Format | None = None,
        device_layers: int = 0,
        pin: bool = False,
        kernel: str = "auto",
    ) -> None:
        """Make the layers; nothing is allocated before the first token comes.

        Args:
            device_layers: so many layers from the first stay on the device.
        """
        self.capacity = capacity
        self.attends_on_host = placement == "host_attention"
        self.keys, self.values = keys or Format(), values or Format()
        self.memory = Memory(pin=pin)
        self.attention = HostAttention(wanted=kernel)
        self.fetcher = Fetcher(self)
        self._lanes: Lanes | None = None
        self._biases: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        made = AttendedLayer if self.attends_on_host else FetchedLayer
        types, settings = get_layer_types_and_kwargs(config.get_text_config(decoder=True))
        layers: list[Any] = []
        for index, (kind, setting) in enumerate(zip(types, settings, strict=True)):
            if kind in MOVABLE and index >= device_layers:
                layers.append(made(self, index, setting.get("sliding_window")))
            else:
                layers.append(DYNAMIC_LAYER_TYPE_MAPPING[kind](**setting))
        super().__init__(layers=layers)
        self.on_host: list[HostLayer] = [layer for layer in layers if isinstance(layer, HostLayer)]

    def lanes_of(self, device: torch.device) -> Lanes:
        """Return the lanes of the model's device."""
        if self._lanes is None:
            self._lanes = Lanes(device)
        return self._lanes

    def bias_of(self, mask: torch.Tensor | None, layer: AttendedLayer) -> torch.Tensor | None:
        """Return a mask as numbers on the host, in the order of the layer's slots.

        All layers of a step share one mask, so it is copied once a step.
        """
        if mask is None:
            return None
        known = self._biases.get(id(mask))
        if known is None or known[0] is not mask:
            if len(self._biases) > 8:
                self._biases.clear()
            bias = bias_from(self.memory.to_host(mask), layer.held)
            known = self._biases[id(mask)] = (mask, layer.in_slot_order(bias))
        return known[1]

    def settle_all_but_last(self, writing: HostLayer) -> None:
        """Empty the staging buffers of a prompt, except those of the layer before `writing`.

        All layers of a prompt would hold as much again as the whole cache. One copy stays on its
        way while the next layer computes.
        """
        index = self.on_host.index(writing)
        for layer in self.on_host[: max(0, index - 1)]:
            if layer.is_staged:
                layer.settle()

    def reset(self) -> None:
        """Forget all tokens, and keep the buffers for the next generation."""
        super().reset()
        self._biases.clear()

    def release(self) -> None:
        """Free every buffer: the next batch has another shape."""
        if any(layer.past for layer in self.on_host):
            return
        for layer in self.on_host:
            layer.release()
        self.fetcher.slots.clear()
        self.memory.forget()

    def bytes_held(self) -> int:
        """Count the bytes of buffers on host and device, and of the layers that stay there."""
        stay = [layer for layer in self.layers if not isinstance(layer, HostLayer)]
        tensors = [value for layer in stay for value in vars(layer).values()]
        tensors += [
            state for value in tensors if isinstance(value, dict) for state in value.values()
        ]
        held = sum(
            value.numel() * value.element_size()
            for value in tensors
            if isinstance(value, torch.Tensor) and value.dim() > 1
        )
        return held + self.memory.host_bytes + self.memory.device_bytes

    @property
    def host_bytes(self) -> int:
        """Bytes of the buffers in host memory."""
        return self.memory.host_bytes


@dataclass
class Slot:
    """Device buffers for one layer's tokens [slots, batch, heads, dim]."""

    keys: torch.Tensor
    values: torch.Tensor
    owner: HostLayer | None = None
    first: int = 0
    past: int = 0
    ready: Any = None


class Fetcher:
    """Brings layers back to the device, one ahead of the layer that computes.

    Two slots take turns: one is read by attention while the other is filled.
    """

    def __init__(self, cache: HostCache) -> None:
        self._cache = cache
        self.slots: dict[tuple[object, ...], tuple[Slot, Slot]] = {}

    def get(self, layer: HostLayer, first: int, past: int) -> Slot:
        """Return the slot that holds a layer's tokens [first, past), copying them if none does."""
        pair = self._pair(layer)
        slot = next(
            (
                slot
                for slot in pair
                if slot.owner is layer and (slot.first, slot.past) == (first, past)
            ),
            None,
        )
        if slot is None:
            slot = next((slot for slot in pair if slot.owner is None), pair[0])
            self._load(layer, slot, first, past)
        self._cache.lanes_of(layer.device).computed_after(slot.ready)
        return slot

    def prefetch_after(self, layer: HostLayer, used: Slot) -> None:
        """Start to copy the layer that computes next, around to the first one after the last."""
        order = self._cache.on_host
        following = order[(order.index(layer) + 1) % len(order)]
        if following is layer or not following.is_initialized or following.past == 0:
            return
        pair = self._pair(following)
        slot = pair[1] if pair[0] is used else pair[0]
        if slot.owner is following and slot.past == following.past:
            return
        self._load(following, slot, following.first_visible(following.past), following.past)

    def forget(self, layer: HostLayer) -> None:
        """Drop what was fetched ahead for a layer: its tokens have changed."""
        for pair in self.slots.values():
            for slot in pair:
                if slot.owner is layer:
                    slot.owner = None

    def _pair(self, layer: HostLayer) -> tuple[Slot, Slot]:
        """Return the two slots for layers of this one's sizes."""
        assert layer.stored is not None
        keys, values = (part.shape for part in layer.stored)
        sizes = (layer.capacity, keys.batch, keys.heads, keys.dim, values.dim, layer.dtype)
        if sizes not in self.slots:
            memory, lead = self._cache.memory, (layer.capacity, keys.batch, keys.heads)

            def made() -> Slot:
                return Slot(
                    keys=memory.device((*lead, keys.dim), layer.dtype, layer.device),
                    values=memory.device((*lead, values.dim), layer.dtype, layer.device),
                )

            self.slots[sizes] = (made(), made())
        return self.slots[sizes]

    def _load(self, layer: HostLayer, slot: Slot, first: int, past: int) -> None:
        assert layer.stored is not None
        layer.settle()
        lanes = self._cache.lanes_of(layer.device)
        with lanes.copying():
            moved = sum(
                part.read(first, past - first, buffer)
                for part, buffer in zip(layer.stored, (slot.keys, slot.values), strict=True)
            )
        if layer.device.type != "cpu":
            self._cache.memory.traffic.to_device_bytes += moved
        slot.owner, slot.first, slot.past, slot.ready = layer, first, past, lanes.mark()
