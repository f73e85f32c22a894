"""Lay out the weights as ZeRO-3 does: stored size, partition, swapped to NVMe or not.

Sizes are in elements of the compute dtype, as DeepSpeed counts them. The rules were read in
DeepSpeed 0.19.8 (runtime/zero/partition_parameters.py,
runtime/swap_tensor/partitioned_param_swapper.py) and confirmed by running at N and N-1 elements.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from dataclasses import dataclass
from functools import lru_cache

from zinfer.config import ITEMSIZE_BYTES, DtypeConfig, RunConfig
from zinfer.model import quantisable
from zinfer.model.spec import ModelSpec, Parameter
from zinfer.units import MIB

MIN_SWAP_BYTES = MIB
"""DeepSpeed swaps no smaller partition (MIN_AIO_BYTES in partitioned_param_swapper.py)."""
TUNED_AIO_BLOCK_BYTES = MIB
PAPER_AIO_BLOCK_BYTES = 16 * MIB


@dataclass(frozen=True, kw_only=True)
class ZeroLayout:
    """One rank's view of a model under ZeRO-3."""

    itemsize_bytes: int
    stored_numel: int
    """All parameters of the model as stored (quantised ones smaller), over all ranks."""
    packed_numel: int
    """Of these, the elements that hold codes and scales."""
    packed_bits: tuple[int, ...]
    """Bits of a code that occur, the most first; empty where nothing is packed."""
    swap_min_numel: int
    """Partitions of at least this many elements are swapped to NVMe, smaller ones kept."""
    swapped_numel: int
    """Elements of one rank's swapped partitions."""
    swapped_count: int
    """Parameters that are swapped."""
    largest_swapped_numel: int
    """The smallest staging buffer that works; 0 when nothing is swapped."""
    largest_swapped_in_layers_numel: int
    """The largest of the decoder layers' own; 0 when none of them is swapped."""
    swapped_per_module: int
    """Most swapped parameters that one module owns: all of them are in buffers at once."""
    swapped_per_layer: int
    parameters_per_layer: float
    """The mean over the decoder layers."""
    separate_experts: bool
    """Each routed expert is a module of its own; else all of a layer are one parameter."""
    layer_numel: int
    """Stored elements of the largest decoder layer, over all ranks."""
    largest_numel: int
    """The largest single parameter as computed with (dequantised), in elements."""
    largest_stored_numel: int
    """The largest single parameter as it is stored."""
    small_numel: int
    """Elements of parameters that stay on the device: those of at most hidden_size elements."""


def aio_block_bytes(config: RunConfig) -> int:
    """Return the bytes of one NVMe read request; it is also the swap minimum."""
    if config.zero.derivation == "paper":
        return PAPER_AIO_BLOCK_BYTES
    return config.zero.aio_block_size_bytes or TUNED_AIO_BLOCK_BYTES


def stored_numel(
    parameter: Parameter, dtype: DtypeConfig, itemsize_bytes: int, *, by_deepspeed: bool
) -> int:
    """Return the elements that are stored for this parameter.

    DeepSpeed quantises linear and embedding weights: packed values plus one scale and one offset
    per group, in the compute type.
    """
    if not by_deepspeed:
        return quantisable.stored_numel(parameter, dtype, itemsize_bytes)
    if dtype.bits is None or parameter.kind not in ("linear", "embedding"):
        return parameter.numel
    packed = parameter.numel * dtype.bits // (8 * itemsize_bytes)
    return packed + 2 * (parameter.numel // dtype.group_size)


def _bits_of(parameter: Parameter, dtype: DtypeConfig, *, by_deepspeed: bool) -> int | None:
    """Return the bits of a stored code; None: the weight is kept in the compute type."""
    if not by_deepspeed:
        return quantisable.stored_bits(parameter, dtype)
    return dtype.bits if parameter.kind in ("linear", "embedding") else None


class _ByIdentity:
    """A model's parameters as a key: their content need not be hashed, there are thousands."""

    def __init__(self, parameters: tuple[Parameter, ...]) -> None:
        self.parameters = parameters

    def __hash__(self) -> int:
        return id(self.parameters)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _ByIdentity) and other.parameters is self.parameters


def zero_layout(config: RunConfig, spec: ModelSpec) -> ZeroLayout:
    """Return the layout of this run's weights on one of its ranks."""
    itemsize = ITEMSIZE_BYTES[spec.dtype]
    return _layout(
        _ByIdentity(spec.parameters),
        hidden_size=spec.hidden_size,
        ranks=config.launcher.ranks,
        dtype=config.dtype,
        by_deepspeed=config.quantiser == "deepspeed",
        itemsize=itemsize,
        swap_min=max(MIN_SWAP_BYTES, aio_block_bytes(config)) // itemsize,
    )


@lru_cache(maxsize=64)
def _layout(
    model: _ByIdentity,
    *,
    hidden_size: int,
    ranks: int,
    dtype: DtypeConfig,
    by_deepspeed: bool,
    itemsize: int,
    swap_min: int,
) -> ZeroLayout:
    swapped: list[int] = []
    per_module: Counter[str] = Counter()
    per_layer: Counter[int] = Counter()
    layer_numel: defaultdict[int, int] = defaultdict(int)
    total = packed = small = largest = in_layers = largest_in_layers = 0
    bits: set[int] = set()
    for parameter in model.parameters:
        numel = stored_numel(parameter, dtype, itemsize, by_deepspeed=by_deepspeed)
        total += numel
        largest = max(largest, numel)
        if stored := _bits_of(parameter, dtype, by_deepspeed=by_deepspeed):
            packed += numel
            bits.add(stored)
        if parameter.numel <= hidden_size:
            small += numel
        if parameter.layer is not None:
            layer_numel[parameter.layer] += numel
            in_layers += 1
        partition = -(-numel // ranks)
        if partition >= swap_min:
            swapped.append(partition)
            per_module[parameter.module] += 1
            if parameter.layer is not None:
                per_layer[parameter.layer] += 1
                largest_in_layers = max(largest_in_layers, partition)
    return ZeroLayout(
        itemsize_bytes=itemsize,
        stored_numel=total,
        packed_numel=packed,
        packed_bits=tuple(sorted(bits, reverse=True)),
        swap_min_numel=swap_min,
        swapped_numel=sum(swapped),
        swapped_count=len(swapped),
        largest_swapped_numel=max(swapped, default=0),
        largest_swapped_in_layers_numel=largest_in_layers,
        swapped_per_module=max(per_module.values(), default=0),
        swapped_per_layer=max(per_layer.values(), default=0),
        parameters_per_layer=in_layers / max(1, len(layer_numel)),
        separate_experts=any(
            parameter.is_expert and len(parameter.shape) == 2 for parameter in model.parameters
        ),
        layer_numel=max(layer_numel.values(), default=total),
        largest_numel=max(parameter.numel for parameter in model.parameters),
        largest_stored_numel=largest,
        small_numel=small,
    )
