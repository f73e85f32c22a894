"""Say which weights are stored in 8 or 4 bits, and how many bytes each then takes.

A packed weight holds its codes first, then a scale and a minimum in float16 for each group:
value = scale * code + minimum. Groups lie along the input dimension, which a product sums over.
docs/quantised.md says why each sort of weight is packed or kept.
"""

from __future__ import annotations

from fnmatch import fnmatchcase
from typing import TYPE_CHECKING

from zinfer.model.parameters import Parameter

if TYPE_CHECKING:
    from zinfer.config import DtypeConfig

EMBEDDINGS = "embeddings"
"""This word in a list of patterns means every embedding of tokens, however it is named."""
HEAD = "head"
"""This word means the output head, however it is named, and an embedding that is the head too."""
SCALE_BYTES = 4
"""Bytes of one group's scale and minimum, each in float16."""
COMPUTE_BYTES = 2
"""Bytes of one element as computed; packing that does not get below it is left out."""
ROUTERS = ("gate", "router", "shared_expert_gate")
"""Names of modules that choose experts. They are small, and an error there picks another expert."""
POSITIONS = ("position", "wpe", "pos_emb")
"""Parts of the names of embeddings of positions."""


def stored_bits(parameter: Parameter, dtype: DtypeConfig) -> int | None:
    """Return the bits of one stored value; None: the weight stays in the compute type.

    Packed are weights of linear layers, of experts, and of token embeddings. Never packed are
    routers, norms, biases, positions, and what would not get smaller.
    """
    bits = dtype.bits
    if bits is None or not is_packable(parameter) or is_named(parameter, dtype.keep):
        return None
    if bits < 8 and is_named(parameter, dtype.eight_bits):
        bits = 8
    packed = packed_bytes(parameter.numel, inputs_of(parameter), bits, dtype.group_size)
    return bits if packed < parameter.numel * COMPUTE_BYTES else None


def is_packable(parameter: Parameter) -> bool:
    """Tell if a weight is of a sort that can be packed."""
    module = parameter.module.rpartition(".")[2]
    if parameter.kind == "embedding":
        return not any(part in module for part in POSITIONS)
    if parameter.kind == "linear":
        return module not in ROUTERS
    if parameter.is_expert and len(parameter.shape) == 3:
        return True
    return parameter.is_transposed and len(parameter.shape) == 2


def is_named(parameter: Parameter, patterns: tuple[str, ...]) -> bool:
    """Tell if a pattern matches whole parts of the weight's name.

    `lm_head` and `layers.0` match `lm_head.weight` and `model.layers.0.mlp.up_proj.weight`; `*`
    stands for anything. The word `embeddings` matches every embedding, `head` the output head.
    """
    name = f".{parameter.name}."
    return any(
        (pattern == EMBEDDINGS and parameter.kind == "embedding")
        or (pattern == HEAD and parameter.is_head)
        or fnmatchcase(name, f"*.{pattern}.*")
        for pattern in patterns
    )


def inputs_of(parameter: Parameter) -> int:
    """Return the size of the input dimension: the last one, or the one before if transposed."""
    return parameter.shape[-2 if parameter.is_transposed else -1]


def groups_of(inputs: int, group_size: int) -> int:
    """Return the groups of one row. The last one is filled up where the size does not divide."""
    return -(-inputs // group_size)


def packed_bytes(numel: int, inputs: int, bits: int, group_size: int) -> int:
    """Return the bytes of a packed weight's codes and scales.

    Args:
        numel: elements of the weight.
        inputs: elements of one row of it.
    """
    groups = numel // inputs * groups_of(inputs, group_size)
    return groups * (group_size * bits // 8 + SCALE_BYTES)


def stored_numel(parameter: Parameter, dtype: DtypeConfig, itemsize_bytes: int) -> int:
    """Return the elements of the compute type that a weight takes as it is stored.

    Args:
        itemsize_bytes: of the compute type; a packed weight is filled up to whole elements.
    """
    bits = stored_bits(parameter, dtype)
    if bits is None:
        return parameter.numel
    count = packed_bytes(parameter.numel, inputs_of(parameter), bits, dtype.group_size)
    return -(-count // itemsize_bytes)
