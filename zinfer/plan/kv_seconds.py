"""Predict what attention and the KV cache's copies take in a pass, from measured rates."""

from __future__ import annotations

from collections import Counter

from zinfer.config import ITEMSIZE_BYTES, RunConfig
from zinfer.machine.measured import Rate
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.kv_layout import KvLayer
from zinfer.model.spec import ModelSpec
from zinfer.plan.kv_placement import moved_layers
from zinfer.plan.kv_traffic import (
    host_attention_share,
    kv_traffic,
    moved_read_bytes,
)

HOST_ATTENTION = "attention on the host"
KV_TO_DEVICE = "kv cache to the device"
KV_TO_HOST = "kv cache to the host"


def attention_seconds(
    spec: ModelSpec,
    profile: CalibrationProfile,
    rows: int,
    new: int,
    context: float,
    *,
    config: RunConfig | None = None,
) -> float:
    """Return the seconds of scores and weighted values on the device.

    In decode also the copy of transformers' own cache into one that is a token longer (torch.cat).
    A cache in host memory is not copied so: it was allocated for the last token.

    Args:
        config: where the cache is placed; None: transformers' own cache, on the device.
    """
    flops = 4 * spec.num_layers * spec.num_attention_heads * spec.head_dim * rows * new * context
    if new > 1:
        rate = profile.attention_flops.get(spec.dtype)
        return flops / rate.median if rate else 0.0
    where = _layers_by_place(spec, config)
    measured = _measured_attention_s(spec, profile, rows, context, where)
    if measured is not None:
        return measured
    size = ITEMSIZE_BYTES[spec.dtype]
    layer_bytes = {
        place: rows * size * sum(layer.grown_values(int(context)) for layer in layers)
        for place, layers in where.items()
    }
    rate = profile.attention.get(spec.dtype)
    attended_s = sum(layer_bytes.values()) / rate.median if rate else 0.0
    return attended_s + layer_bytes["device"] / profile.host_copy.median


def _layers_by_place(spec: ModelSpec, config: RunConfig | None) -> dict[str, list[KvLayer]]:
    """Return the layers whose attention the device computes, by where their cache is.

    `device`: it grows there. `slot`: it is copied there for its turn.
    """
    layers = list(spec.kv_layers or ())
    if config is None or not config.kv_cache.is_offloaded:
        return {"device": layers, "slot": []}
    moved = list(moved_layers(spec, config))
    stay = [layer for layer in layers if not any(layer is other for other in moved)]
    return {"device": stay, "slot": moved if config.kv_cache.placement == "host" else []}


def _measured_attention_s(
    spec: ModelSpec,
    profile: CalibrationProfile,
    rows: int,
    context: float,
    where: dict[str, list[KvLayer]],
) -> float | None:
    """Return the seconds of growing and attending, layer by layer; None: it was not measured."""
    shared_by = spec.num_attention_heads / max(1, spec.num_kv_heads)
    seconds = 0.0
    for place, layers in where.items():
        sizes = Counter(layer.grown_values(int(context)) for layer in layers)
        for values, count in sizes.items():
            found = profile.device_attention_s(
                spec.dtype, shared_by or 1, rows * values * ITEMSIZE_BYTES[spec.dtype]
            )
            if found is None:
                return None
            seconds += count * (found.slot_s if place == "slot" else found.grow_s + found.attend_s)
    return seconds


def kv_copy_seconds(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, new: int, context: float
) -> dict[str, float] | None:
    """Return seconds by cause that a cache in host memory adds to a pass; empty on the device.

    None: the link was not measured. On a GPU packing codes is not counted: it was not measured.
    """
    if not config.kv_cache.is_offloaded:
        return {}
    rows, on_cpu = config.batch.batch_size, profile.device_kind == "cpu"
    plain, stored = moved_read_bytes(spec, config, rows, context)
    if on_cpu:
        return _copied_in_host_memory(spec, config, profile, new, plain, stored)
    moved = kv_traffic(spec, config, rows, new=new, context=context, aliased=False)
    to_device, to_host = _links(config, profile)
    if to_device is None or to_host is None:
        return None
    out_s = moved.to_host_bytes / to_host.median
    in_s = moved.to_device_bytes / to_device.median
    if new > 1:
        return {KV_TO_HOST: out_s}
    if config.kv_cache.placement == "host":
        return {KV_TO_DEVICE: in_s}
    return {HOST_ATTENTION: _attended_s(spec, config, profile, stored) + out_s + in_s}


def _copied_in_host_memory(
    spec: ModelSpec,
    config: RunConfig,
    profile: CalibrationProfile,
    new: int,
    plain: float,
    stored: float,
) -> dict[str, float]:
    """Return seconds by cause where the device's memory is the host's.

    Args:
        plain: bytes of keys and values that are attended to, as computed.
        stored: the same as they are stored.
    """
    if new > 1:
        return {KV_TO_HOST: _stored_s(spec, config, profile, plain)}
    token, _ = moved_read_bytes(spec, config, config.batch.batch_size, 1)
    kept = {KV_TO_HOST: _stored_s(spec, config, profile, token)}
    if config.kv_cache.placement == "host":
        return kept | {KV_TO_DEVICE: _fetched_s(spec, config, profile, plain, stored)}
    return kept | {HOST_ATTENTION: _attended_s(spec, config, profile, stored)}


def _fetched_s(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, plain: float, stored: float
) -> float:
    """Return the seconds in which all layers are read as stored and written to slots as computed.

    Half of `plain` are keys. Codes are unpacked layer by layer, where that was measured.
    """
    layers = max(1, sum(1 for _ in moved_layers(spec, config)))
    values = plain / 2 / ITEMSIZE_BYTES[spec.dtype] / layers
    seconds = 0.0
    for bits in (config.kv_cache.bits_of_keys, config.kv_cache.bits_of_values):
        if bits == 16:
            seconds += plain / profile.host_copy.median
            continue
        unpacking_s = profile.unpacking_s(bits, spec.dtype, values)
        if unpacking_s is None:
            return (stored + plain) / profile.host_copy.median
        seconds += layers * unpacking_s
    return seconds


def _stored_s(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, plain: float
) -> float:
    """Return the seconds of storing new keys and values of all layers, `plain` bytes as computed.

    Half of them are keys. 16 bits are read and written once; codes are packed layer by layer.
    """
    layers = max(1, sum(1 for _ in moved_layers(spec, config)))
    seconds = 0.0
    for bits in (config.kv_cache.bits_of_keys, config.kv_cache.bits_of_values):
        half = plain / 2
        if bits == 16:
            seconds += 2 * half / profile.host_copy.median
        else:
            values = half / ITEMSIZE_BYTES[spec.dtype] / layers
            seconds += layers * profile.packing_s(bits, spec.dtype, values)
    return seconds


def _attended_s(
    spec: ModelSpec, config: RunConfig, profile: CalibrationProfile, stored: float
) -> float:
    """Return the seconds of a step's attention on the host over `stored` bytes in all layers.

    Keys and values count half each, in their own bits. PyTorch's formulations were not measured.
    """
    kv, layers = config.kv_cache, sum(1 for _ in moved_layers(spec, config))
    shared_by = spec.num_attention_heads / max(1, spec.num_kv_heads)
    halves = [
        profile.host_attention_s(bits, spec.dtype, shared_by, stored / max(1, layers))
        for bits in (kv.bits_of_keys, kv.bits_of_values)
    ]
    if kv.kernel == "torch" or None in halves:
        return stored / (profile.host_read.median * host_attention_share(spec, config))
    return layers * sum(half or 0.0 for half in halves) / 2


def _links(config: RunConfig, profile: CalibrationProfile) -> tuple[Rate | None, Rate | None]:
    """Return the link's rates (to the device, to the host). None where unmeasured."""
    if config.kv_cache.pin_memory is False:  # pageable copies were measured one way only
        return profile.host_to_device_pageable, profile.host_to_device_pageable
    return profile.host_to_device_pinned, profile.device_to_host_pinned
