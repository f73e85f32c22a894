"""Compare weights that a model has once and a checkpoint stores twice.

Many models use their embedding as output head. transformers unties the two where their values
differ, under ZeRO-3 it drops one of them, and a log line is all that says so. The plan has counted
one of them, too. So such a checkpoint is refused.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from zinfer.config import ConfigError
from zinfer.model.weights.checkpoint import Checkpoint, read_header
from zinfer.units import MIB

PIECE_BYTES = 16 * MIB
"""Bytes of each of the two that are compared at a time."""

Pair = tuple[str, str]
"""Names of two stored tensors that the model has as one."""


def require_equal(checkpoint: Checkpoint, pairs: tuple[Pair, ...]) -> None:
    """Raise ConfigError unless both tensors of each pair have the same values."""
    problems = [
        f"{checkpoint.folder} holds {first} and {second} with different values, and the model has "
        "them as one weight. Set model.overrides.tie_word_embeddings=false"
        for first, second in pairs
        if not _are_equal(checkpoint, first, second)
    ]
    if problems:
        raise ConfigError(problems)


def _are_equal(checkpoint: Checkpoint, first: str, second: str) -> bool:
    one, other = checkpoint.tensors[first], checkpoint.tensors[second]
    if one.file.endswith(".safetensors") and (one.dtype, one.shape) == (other.dtype, other.shape):
        pieces = zip(_pieces(checkpoint, first), _pieces(checkpoint, second), strict=True)
        return all(mine == theirs for mine, theirs in pieces)
    import torch

    mine, theirs = _tensor(checkpoint, first), _tensor(checkpoint, second)
    return mine.shape == theirs.shape and torch.equal(mine.float(), theirs.float())


def _pieces(checkpoint: Checkpoint, name: str) -> Iterator[bytes]:
    """Yield the bytes of a tensor of a safetensors file, piece by piece."""
    path = checkpoint.folder / checkpoint.tensors[name].file
    header, raw = read_header(path)
    begin, end = (8 + len(raw) + offset for offset in header[name]["data_offsets"])
    with path.open("rb") as file:
        file.seek(begin)
        while begin < end:
            piece = file.read(min(PIECE_BYTES, end - begin))
            begin += len(piece)
            yield piece


def _tensor(checkpoint: Checkpoint, name: str) -> Any:
    """Read a tensor of any file."""
    path = checkpoint.folder / checkpoint.tensors[name].file
    if path.suffix == ".safetensors":
        from safetensors import safe_open

        with safe_open(path, "pt") as file:
            return file.get_tensor(name)
    import torch

    return torch.load(path, map_location="cpu", weights_only=True)[name]
