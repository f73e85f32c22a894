"""Count what the KV cache moves in one forward pass, over which memory and which way of the link.

A cache on the device is read there. `host` copies each layer to the device for its turn, so the
link carries the whole cache once a step. `host_attention` reads it where it lies, and the link
carries the query, the new token and the output.
"""

from __future__ import annotations

from dataclasses import dataclass

from zinfer.config import ITEMSIZE_BYTES, RunConfig
from zinfer.model.spec import ModelSpec
from zinfer.plan.kv_placement import moved_layers, slots, stored_bytes

GROUPED_FROM = 4
"""Query heads that share a KV head from which arithmetic, not memory, bounds the kernel."""
HOST_ATTENTION_SHARE = {
    ("compiled", False): 0.75,
    ("compiled", True): 0.45,
    ("torch", False): 0.4,
    ("torch", True): 0.1,
}
"""(kernel, KV heads are shared) -> share of host memory's read rate that attention reaches.

Taken where this machine was not calibrated for it. Measured on two cores with AVX2, head_dim 128,
512 to 8,192 tokens in float32 and bfloat16: the compiled kernel reached 0.71 to 0.89, and 0.42 to
0.55 where eight query heads share a KV head; PyTorch's best formulation 0.3 to 0.5, and 0.05 to
0.2.
"""


@dataclass(frozen=True, kw_only=True)
class KvTraffic:
    """Bytes of one forward pass of one rank, beside those of the weights.

    Without an accelerator all of them are in `device_bytes`: its memory is the host's.
    """

    device_bytes: float
    """Read and written in device memory."""
    host_bytes: float
    """Read and written in host memory."""
    to_device_bytes: float
    to_host_bytes: float
    """Over the link, each way apart: both ways work at once."""


def kv_read_bytes(spec: ModelSpec, rows: int, context: float) -> float:
    """Return the bytes of keys and values of `context` tokens of each row.

    0 where the cache is unknown: a lower bound stays one.
    """
    layers = spec.kv_layers or ()
    return (
        rows
        * sum(layer.grown_values(int(context)) for layer in layers)
        * ITEMSIZE_BYTES[spec.dtype]
    )


def moved_read_bytes(
    spec: ModelSpec, config: RunConfig, rows: int, context: float
) -> tuple[int, int]:
    """Return the bytes of layers in host memory, as (computed, stored): codes are fewer bytes."""
    size, tokens = ITEMSIZE_BYTES[spec.dtype], int(context)
    plain = stored = 0
    for layer in moved_layers(spec, config):
        held = rows * slots(layer, tokens)
        plain += held * layer.values_per_token * size
        stored += held * stored_bytes(layer, config, size)
    return plain, stored


def kv_traffic(
    spec: ModelSpec, config: RunConfig, rows: int, *, new: int, context: float, aliased: bool
) -> KvTraffic:
    """Count what the cache moves in a pass of `new` tokens of each of `rows` sequences.

    Args:
        context: tokens that are attended to.
        aliased: device memory is host memory, so nothing crosses a link.
    """
    whole = kv_read_bytes(spec, rows, context)
    if not config.kv_cache.is_offloaded:
        return KvTraffic(device_bytes=whole, host_bytes=0, to_device_bytes=0, to_host_bytes=0)
    plain, stored = moved_read_bytes(spec, config, rows, context)
    if new > 1:  # the prompt's keys and values are read once more, to be stored on the host
        found = KvTraffic(
            device_bytes=whole + plain,
            host_bytes=stored,
            to_device_bytes=0,
            to_host_bytes=stored,
        )
    elif config.kv_cache.placement == "host":
        found = KvTraffic(
            device_bytes=whole + plain,  # written to its slot, then read
            host_bytes=stored,
            to_device_bytes=stored,
            to_host_bytes=_new_token_bytes(spec, config, rows),
        )
    else:
        query = query_bytes(spec, config, rows)
        found = KvTraffic(
            device_bytes=max(0.0, whole - _cached_bytes(spec, config, rows, context)),
            host_bytes=stored,
            to_device_bytes=query,
            to_host_bytes=query + _new_token_bytes(spec, config, rows),
        )
    if not aliased:
        return found
    return KvTraffic(
        device_bytes=found.device_bytes + found.host_bytes,
        host_bytes=0,
        to_device_bytes=0,
        to_host_bytes=0,
    )


def query_bytes(spec: ModelSpec, config: RunConfig, rows: int) -> int:
    """Return the bytes of a token's queries of all layers in host memory; outputs are as many."""
    layers = sum(1 for _ in moved_layers(spec, config))
    return rows * layers * spec.num_attention_heads * spec.head_dim * ITEMSIZE_BYTES[spec.dtype]


def host_attention_share(spec: ModelSpec, config: RunConfig) -> float:
    """Return the share of host memory's read rate that attention on the host reaches."""
    kernel = "torch" if config.kv_cache.kernel == "torch" else "compiled"
    grouped = spec.num_attention_heads >= GROUPED_FROM * max(1, spec.num_kv_heads)
    return HOST_ATTENTION_SHARE[kernel, grouped]


def _new_token_bytes(spec: ModelSpec, config: RunConfig, rows: int) -> int:
    size = ITEMSIZE_BYTES[spec.dtype]
    return rows * sum(stored_bytes(layer, config, size) for layer in moved_layers(spec, config))


def _cached_bytes(spec: ModelSpec, config: RunConfig, rows: int, context: float) -> int:
    """Count the share of kv_read_bytes that layers in host memory have."""
    size, tokens = ITEMSIZE_BYTES[spec.dtype], int(context)
    return rows * sum(layer.grown_values(tokens) * size for layer in moved_layers(spec, config))
