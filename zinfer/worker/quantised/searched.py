"""Packed weights of dtype.rounding=searched: made once for a checkpoint, afterwards only read.

Loading asks for each weight by its name and gets the bytes that it would otherwise pack itself.
"""

from __future__ import annotations

import hashlib
import time

import torch

from zinfer.config import ConfigError, DtypeConfig, RunConfig
from zinfer.job.events import EventLog
from zinfer.machine.memory import host_available_bytes
from zinfer.model.quantisable import inputs_of, packed_bytes, stored_bits
from zinfer.model.spec import ModelSpec
from zinfer.model.tokenizer import find_tokenizer, require_embedded
from zinfer.model.weights.local import local_folder
from zinfer.model.weights.pretrained import Opened
from zinfer.plan.problems import has_position_table
from zinfer.units import format_bytes
from zinfer.worker.quantised.calibrated import calibration_ids, pack_model
from zinfer.worker.quantised.kept import Kept, Take, kept_weights, remove


class SearchedWeights:
    """The packed weights of one checkpoint and scheme, in the cache folder."""

    def __init__(
        self,
        opened: Opened,
        dtype: DtypeConfig,
        spec: ModelSpec,
        ids: torch.Tensor,
        events: EventLog,
    ) -> None:
        """Find them, or make them: then the text of `ids` [rows, tokens] runs through the model.

        Raises:
            ConfigError: a disk without room, memory that does not hold a layer, a file without
                safetensors.
        """
        self._opened = opened
        self._dtype = dtype
        self._ids = ids
        self._events = events
        self._spec = spec
        bits = {each: stored_bits(each, dtype) for each in spec.parameters}
        self._sizes = {
            each.name: packed_bytes(each.numel, inputs_of(each), stored, dtype.group_size)
            for each, stored in bits.items()
            if stored is not None
        }
        checkpoint = opened.checkpoint
        if checkpoint is None or any(
            not name.endswith(".safetensors") for name in checkpoint.files
        ):
            raise ConfigError(
                [
                    f"dtype.rounding=searched reads safetensors, and {opened.source} has others. "
                    "Set dtype.rounding=nearest"
                ]
            )
        self._key = {
            "weights": checkpoint.fingerprint(),
            "changed": [(checkpoint.folder / each).stat().st_mtime_ns for each in checkpoint.files],
            "group_size": dtype.group_size,
            "symmetric": dtype.symmetric,
            "bytes": self._sizes,
            "text": hashlib.sha256(ids.numpy().tobytes()).hexdigest(),
        }
        self.seconds = 0.0
        """How long searching took, or waiting for another rank's; 0 where it was done before."""
        self._made = False
        self._kept: Kept = self._find()

    def __contains__(self, name: object) -> bool:
        """Tell if this parameter is kept packed."""
        return name in self._kept

    def fingerprint(self) -> str:
        """Hash all packed weights."""
        return self._kept.fingerprint()

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor:
        """Return a parameter's packed bytes, uint8 of one dimension; all, or from begin to end.

        Damaged ones are made again; they come out the same, so that those read before still fit.
        """
        found = self._kept.read(name, begin, end)
        if found is None:  # another rank may have made them again meanwhile
            self._kept = self._find()
            found = self._kept.read(name, begin, end)
        if found is None:
            remove(self._kept, self._events, name)
            self._kept = self._find()
            found = self._kept.read(name, begin, end)
        if found is None:
            raise OSError(f"{self._kept.folder} does not give back what was written: {name}")
        return found

    def _find(self) -> Kept:
        """Find them or make them, alone or by waiting for another rank that does."""
        started_s, waited = time.perf_counter(), []
        kept = kept_weights(
            self._key, self._sizes, self._make, self._events, waiting=lambda: waited.append(True)
        )
        if waited or self._made:
            self.seconds += time.perf_counter() - started_s
            self._made = False
        return kept

    def _make(self, take: Take) -> None:
        self._made = True
        self._events.phase("round weights")
        _require_memory(self._spec)
        pack_model(self._opened, self._dtype, self._spec.parameters, self._ids, take, self._events)


def searched_if_asked(
    opened: Opened, config: RunConfig, spec: ModelSpec, events: EventLog
) -> SearchedWeights | None:
    """Find or make them as `searched_weights` does; None under dtype.rounding=nearest."""
    if config.dtype.rounding != "searched":
        return None
    return searched_weights(opened, config, spec, events)


def searched_weights(
    opened: Opened, config: RunConfig, spec: ModelSpec, events: EventLog
) -> SearchedWeights:
    """Find or make the packed weights of this run.

    Call it before an HfDeepSpeedConfig is alive: afterwards transformers builds partitioned models.

    Raises:
        ConfigError: they cannot be made: no tokenizer, no room on the disk or in memory.
    """
    tokenizer, reason = find_tokenizer(config.model, local_folder(config.model))
    if tokenizer is None:
        raise ConfigError(
            [
                f"dtype.rounding=searched reads a text, and {reason}. Set dtype.rounding=nearest",
            ]
        )
    most = spec.max_positions if has_position_table(spec) else None
    ids = calibration_ids(tokenizer, most)
    require_embedded(ids.flatten().tolist(), spec.vocab_size, tokenizer, "dtype.rounding=nearest")
    return SearchedWeights(opened, config.dtype, spec, ids, events)


def _require_memory(spec: ModelSpec) -> None:
    """Raise ConfigError where this machine cannot hold one layer in float32 and its inputs."""
    layer = spec.largest_layer_numel
    outside = sum(each.numel for each in spec.parameters if each.layer is None)
    needed = 4 * (2 * layer + outside)
    free = host_available_bytes()
    if free is not None and needed > free:
        raise ConfigError(
            [
                f"dtype.rounding=searched takes {format_bytes(needed)} to round one layer of "
                f"{spec.name}, {format_bytes(free)} are free. Set dtype.rounding=nearest"
            ]
        )
