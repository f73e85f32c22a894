"""Give the generations of a run their KV cache, and account for it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from zinfer.config import ConfigError, KvCacheConfig, RunConfig
from zinfer.job.events import EventLog
from zinfer.machine.memory import host_available_bytes
from zinfer.plan.kv_placement import is_pinned
from zinfer.plan.planned import Planned
from zinfer.units import format_bytes
from zinfer.worker.kv_cache import packer
from zinfer.worker.kv_cache.cache import HostCache
from zinfer.worker.kv_cache.memory import Traffic
from zinfer.worker.kv_cache.routes import attached
from zinfer.worker.kv_cache.store import Format


@dataclass(frozen=True, kw_only=True)
class KvUse:
    """The KV cache of one rank in host memory, as measured in one generation."""

    host_bytes: int
    device_bytes: int
    """Slots for layers that are copied back; layers that stay on the device are not in it."""
    pinned_bytes: int
    copied_bytes_per_step: float
    """Over the link, both ways, mean of the decode steps."""
    attention_s_per_step: float
    """Attention on the host, mean of the decode steps."""
    read_bytes_per_step: float
    """Keys and values that attention on the host read, mean of the decode steps."""


class KvSession:
    """One cache for all generations of a run. Without one, transformers makes its own each time."""

    def __init__(self, cache: HostCache | None = None) -> None:
        self._cache = cache
        self._after_prefill = Traffic()

    def arguments(self) -> dict[str, Any]:
        """Return what `generate` needs, with an empty cache."""
        if self._cache is None:
            return {}
        self._cache.reset()
        self._cache.memory.traffic.clear()
        assert self._cache.get_seq_length() == 0, "a second generation would go on with the first"
        return {"past_key_values": self._cache}

    def first_token_is_there(self) -> None:
        """Note what the prefill moved: what follows belongs to the decode steps."""
        if self._cache is not None:
            self._after_prefill = replace(self._cache.memory.traffic)

    def held_bytes(self) -> int | None:
        """Return the bytes of the whole cache; None where it is transformers' own."""
        return None if self._cache is None else self._cache.bytes_held()

    def use(self, decode_steps: int) -> KvUse | None:
        """Account for the generation that just ended; None for a cache on the device."""
        if self._cache is None:
            return None
        memory, before = self._cache.memory, self._after_prefill
        now = memory.traffic
        copied = (now.to_host_bytes - before.to_host_bytes) + (
            now.to_device_bytes - before.to_device_bytes
        )
        return KvUse(
            host_bytes=memory.host_bytes,
            device_bytes=memory.device_bytes,
            pinned_bytes=memory.host_bytes if memory.pin else 0,
            copied_bytes_per_step=copied / decode_steps,
            attention_s_per_step=(now.attention_s - before.attention_s) / decode_steps,
            read_bytes_per_step=(now.attention_bytes - before.attention_bytes) / decode_steps,
        )


@contextlib.contextmanager
def kv_session(model: Any, planned: Planned, events: EventLog) -> Iterator[KvSession]:
    """Place the model's KV cache as configured for the time of the block.

    Raises:
        ConfigError: host memory does not hold the cache.
    """
    config = planned.config
    if not config.kv_cache.is_offloaded:
        yield KvSession()
        return
    on_gpu = not planned.hardware.device_is_host
    require_host_memory(planned)
    cache = host_cache(model, config, on_gpu=on_gpu)
    with attached(model, cache) as route:
        yield KvSession(cache)
    for kind, how in cache.attention.said.items():
        events.write("note", message=f"attention on the host: {kind}: {how} ({route})")
    if min(cache.keys.bits, cache.values.bits) < 16 and config.kv_cache.kernel != "torch":
        problem = packer.library()
        if isinstance(problem, str):
            events.write("note", message=f"codes are packed by PyTorch, because {problem}")


def host_cache(model: Any, config: RunConfig, *, on_gpu: bool) -> HostCache:
    """Make the cache that this configuration asks for; it allocates when the first token comes."""
    kv, batch = config.kv_cache, config.batch
    assert kv.placement != "device"
    return HostCache(
        model.config,
        capacity=batch.prompt_tokens + batch.new_tokens - 1,
        placement=kv.placement,
        keys=stored_as(kv, kv.bits_of_keys),
        values=stored_as(kv, kv.bits_of_values),
        device_layers=kv.device_layers,
        pin=is_pinned(config, on_gpu=on_gpu),
        kernel=kv.kernel,
    )


def stored_as(kv: KvCacheConfig, bits: int) -> Format:
    """Describe how keys or values of so many bits are stored."""
    return Format(bits=bits, group_size=kv.group_size, compiled=kv.kernel != "torch")


def require_host_memory(planned: Planned) -> None:
    """Refuse a cache that host memory does not hold, before any of it is allocated.

    Raises:
        ConfigError: with both numbers.
    """
    wanted = planned.kv_host_bytes
    available = host_available_bytes()
    if wanted is None or available is None or wanted <= available:
        return
    raise ConfigError(
        [
            f"the KV cache takes {format_bytes(wanted)} of host memory, and "
            f"{format_bytes(available)} are left. Try a smaller batch.batch_size, "
            "kv_cache.bits=8, or kv_cache=device"
        ]
    )
