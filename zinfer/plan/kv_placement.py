"""Count where the KV cache lies: bytes on the host and on the device, for each placement.

The worker allocates exactly these bytes (zinfer/worker/kv_cache). A cache in host memory has a slot
for every token of the run, or for the window of a layer that has one. Codes of 8 or 4 bits have a
scale and a minimum in float16 for each group.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from zinfer.config import RunConfig
from zinfer.model.kv_layout import KvLayer
from zinfer.model.spec import ModelSpec

MOVABLE_KINDS = frozenset({"mha", "gqa", "mla", "sliding"})
"""Layers that keep keys and values and nothing else; every other layer stays on the device."""
SCALE_BYTES = 4
"""A scale and a minimum in float16."""
KERNEL_DIM_MULTIPLE, KERNEL_LARGEST_DIM = 16, 512
"""Head dimensions that the compiled attention kernel reads."""
KERNEL_GROUP_MULTIPLE = {16: 1, 8: 16, 4: 32}
"""Bits -> what the group size must be a multiple of for the compiled attention kernel."""
SMALLEST_GROUP = 16
FETCH_SLOTS = 2
"""Layers that `host` keeps on the device: the one that computes and the one that comes."""


@dataclass(frozen=True, kw_only=True)
class KvBytes:
    """The KV cache of one rank, at the end of a generation.

    Attributes:
        host_bytes: buffers in host memory; all of them are page-locked where `pinned`.
        device_bytes: layers that stay on the device, and the slots of `host`.
        read_bytes_per_step: keys and values in host memory that one decode step reads.
        copied_bytes_per_step: bytes over the link in one decode step, both ways together.
    """

    host_bytes: int
    device_bytes: int
    pinned: bool
    read_bytes_per_step: int
    copied_bytes_per_step: int

    @property
    def total_bytes(self) -> int:
        """All bytes of the cache."""
        return self.host_bytes + self.device_bytes


def kv_bytes(spec: ModelSpec, config: RunConfig, rows: int, *, on_gpu: bool) -> KvBytes | None:
    """Count the KV cache of `rows` sequences. None: this model's cache is not known.

    The last new token is chosen and never cached.
    """
    if spec.kv_layers is None:
        return None
    kv, batch = config.kv_cache, config.batch
    tokens = batch.prompt_tokens + batch.new_tokens - 1
    size = spec.bytes_per_element
    if not kv.is_offloaded:
        device = rows * sum(layer.cache_bytes(tokens, size) for layer in spec.kv_layers)
        return KvBytes(
            host_bytes=0,
            device_bytes=device,
            pinned=False,
            read_bytes_per_step=0,
            copied_bytes_per_step=0,
        )
    moved = list(moved_layers(spec, config))
    stay = [layer for layer in spec.kv_layers if not any(layer is other for other in moved)]
    stored = [rows * slots(layer, tokens) * stored_bytes(layer, config, size) for layer in moved]
    on_device = rows * sum(layer.cache_bytes(tokens, size) for layer in stay)
    copied = 0
    if kv.placement == "host":
        shapes = {
            (layer.values_per_token, slots(layer, tokens), *_head_dims(layer, spec))
            for layer in moved
        }
        on_device += FETCH_SLOTS * rows * size * sum(values * count for values, count, *_ in shapes)
        copied = sum(stored)
    new_token = rows * sum(stored_bytes(layer, config, size) for layer in moved)
    copied += new_token
    if kv.placement == "host_attention":  # a query is as long as a key, an output as a value
        dims = sum(sum(_head_dims(layer, spec)) for layer in moved)
        copied += rows * spec.num_attention_heads * dims * size
    return KvBytes(
        host_bytes=sum(stored),
        device_bytes=on_device,
        pinned=is_pinned(config, on_gpu=on_gpu),
        read_bytes_per_step=sum(stored),
        copied_bytes_per_step=copied if on_gpu else 0,
    )


def is_pinned(config: RunConfig, *, on_gpu: bool) -> bool:
    """Tell whether the host's part is page-locked: as set, else on a GPU."""
    chosen = config.kv_cache.pin_memory
    return on_gpu if chosen is None else chosen and on_gpu


def moved_layers(spec: ModelSpec, config: RunConfig) -> Iterator[KvLayer]:
    """Yield the layers whose cache goes to host memory."""
    for index, layer in enumerate(spec.kv_layers or ()):
        if layer.kind in MOVABLE_KINDS and index >= config.kv_cache.device_layers:
            yield layer


def slots(layer: KvLayer, tokens: int) -> int:
    """Return the tokens for which host memory is allocated: all, or the window."""
    return tokens if layer.window is None else min(tokens, layer.window)


def stored_bytes(layer: KvLayer, config: RunConfig, bytes_per_element: int) -> int:
    """Return the bytes of one token of one sequence in host memory."""
    kv, values = config.kv_cache, layer.values_per_token
    key_dim, value_dim = layer.key_dim or 1, layer.value_dim or layer.key_dim or 1
    keys = values * key_dim // (key_dim + value_dim)
    parts = ((kv.bits_of_keys, keys), (kv.bits_of_values, values - keys))
    total = 0
    for bits, count in parts:
        if bits == 16:
            total += count * bytes_per_element
        else:
            total += count * bits // 8 + count // kv.group_size * SCALE_BYTES
    return total


def _head_dims(layer: KvLayer, spec: ModelSpec) -> tuple[int, int]:
    """Return the elements of one head's key and of its value."""
    key_dim = layer.key_dim or spec.head_dim
    return key_dim, layer.value_dim or key_dim


def kv_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Yield why this model's KV cache cannot be placed and stored as asked."""
    kv = config.kv_cache
    if not kv.is_offloaded:
        return
    if spec.kv_layers is None:
        yield (
            f"kv_cache={kv.placement}: the cache of {spec.name} is not known "
            f"({spec.kv_unknown_reason}). Set kv_cache=device"
        )
        return
    kinds = {layer.kind for layer in spec.kv_layers}
    if not kinds & MOVABLE_KINDS:
        has = "compresses its keys" if "compressed" in kinds else "has no layer of keys and values"
        yield f"kv_cache={kv.placement}: {spec.name} {has}. Set kv_cache=device"
    elif not any(moved_layers(spec, config)):
        last = max(n for n, layer in enumerate(spec.kv_layers) if layer.kind in MOVABLE_KINDS)
        yield (
            f"kv_cache.device_layers={kv.device_layers} leaves no KV cache in host memory: "
            f"{spec.name} has {spec.num_layers} layers. "
            f"Set kv_cache.device_layers={last} or fewer, or kv_cache=device"
        )
    quantised = min(kv.bits_of_keys, kv.bits_of_values) < 16
    if "mla" in kinds and kv.placement == "host_attention":
        yield (
            f"kv_cache=host_attention: {spec.name} keeps latent vectors (MLA), which are expanded "
            "with weights of the device before attention. Set kv_cache=host"
        )
    if "mla" in kinds and quantised:
        yield (
            f"kv_cache.bits={kv.bits}: {spec.name} keeps latent vectors (MLA), which are stored "
            "as computed only. Set kv_cache.bits=16"
        )
    if quantised and "mla" not in kinds:
        yield from _group_problems(spec, config)
    if kv.kernel == "compiled" and kv.placement == "host_attention":
        yield from _kernel_problems(spec, config)


@dataclass(frozen=True, kw_only=True)
class _HeadPart:
    """A head's keys or its values: so many elements, stored in so many bits."""

    name: str
    bits: int
    dim: int


def _head_parts(spec: ModelSpec, config: RunConfig) -> list[_HeadPart]:
    """List every kind of key and value that goes to host memory, in the order of the layers."""
    kv = config.kv_cache
    found: list[_HeadPart] = []
    for layer in moved_layers(spec, config):
        key_dim, value_dim = _head_dims(layer, spec)
        found.append(_HeadPart(name="keys", bits=kv.bits_of_keys, dim=key_dim))
        found.append(_HeadPart(name="values", bits=kv.bits_of_values, dim=value_dim))
    return list(dict.fromkeys(found))


def _group_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Yield why codes of this model's heads cannot have groups of this size."""
    size = config.kv_cache.group_size
    packed = [part for part in _head_parts(spec, config) if part.bits < 16]
    has_four = any(part.bits == 4 for part in packed)
    sizes = (128, 96, 80, 64, 48, 32, *range(128, SMALLEST_GROUP - 1, -1))
    fits = [
        each
        for each in sizes
        if not any(part.dim % each for part in packed) and not (has_four and each % 2)
    ]
    advice = f"kv_cache.group_size={fits[0]}" if fits else "kv_cache.bits=16"
    wrong = next((part for part in packed if part.dim % size), None)
    if wrong is not None:
        alike = len({part.dim for part in _head_parts(spec, config)}) == 1
        what = f"head dimension of {spec.name}" if alike else f"{wrong.name} of {spec.name}'s heads"
        yield f"kv_cache.group_size={size} does not divide the {what}, {wrong.dim}. Set {advice}"
    elif has_four and size % 2:
        yield f"kv_cache.group_size={size} must be even for 4 bits. Set {advice}"


def _kernel_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Yield why the compiled attention kernel, which is asked for, cannot read this cache."""
    kv, parts = config.kv_cache, _head_parts(spec, config)
    for dim in dict.fromkeys(part.dim for part in parts):
        if dim % KERNEL_DIM_MULTIPLE or dim > KERNEL_LARGEST_DIM:
            yield (
                f"kv_cache.kernel=compiled: {spec.name} has a head dimension of {dim}, which is no "
                f"multiple of {KERNEL_DIM_MULTIPLE} up to {KERNEL_LARGEST_DIM}. "
                "Set kv_cache.kernel=auto"
            )
    for bits in sorted({part.bits for part in parts}):
        if bits < 16 and kv.group_size % KERNEL_GROUP_MULTIPLE[bits]:
            yield (
                f"kv_cache.kernel=compiled reads {bits} bits in groups of a multiple of "
                f"{KERNEL_GROUP_MULTIPLE[bits]}, not of {kv.group_size}. Set kv_cache.kernel=auto"
            )
