"""Read a checkpoint tensor by tensor, and pack each one before the next is read.

transformers renames and fuses tensors on the way, as it does for any model; what it has made of one
parameter is taken from it where a quantiser of its own would stand. So nothing here knows a family.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    ConversionOps,
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from zinfer.config import ConfigError, DtypeConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import (
    SAFETENSORS_DTYPES,
    Checkpoint,
    WrongWeights,
    first_names,
    read_header,
    read_into,
)
from zinfer.model.weights.pretrained import Opened, Read
from zinfer.worker.quantised.building import PackedModel, Place
from zinfer.worker.quantised.parts import Part

if TYPE_CHECKING:
    from zinfer.worker.quantised.searched import SearchedWeights

TORCH_DTYPES = {kind: getattr(torch, name) for name, kind in SAFETENSORS_DTYPES.items()}


class StoredSlice:
    """One tensor of a safetensors file, read when it is indexed. transformers takes it for one."""

    is_wanted = True
    """False where the values are known from elsewhere: then nothing is read."""
    part: range | None = None
    """Indices of the first dimension that are read; None: all. The rest is left as it comes."""

    def __init__(self, path: Path, name: str, begin: int, row: Mapping[str, Any]) -> None:
        self._path, self._name = path, name
        self._dtype, self._shape = row["dtype"], tuple(row["shape"])
        first, last = row["data_offsets"]
        self._begin, self._bytes = begin + first, last - first

    def get_shape(self) -> list[int]:
        """Return its shape."""
        return list(self._shape)

    def get_dtype(self) -> str:
        """Return its type by safetensors' name."""
        return str(self._dtype)

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Read it; into memory of its own, so that the file's pages are nobody's.

        Raises:
            WrongWeights: the file ends too early.
        """
        if not self.is_wanted:
            return torch.zeros(1, dtype=TORCH_DTYPES[self._dtype]).expand(self._shape)[index]
        first, last = 0, self._bytes
        if self.part is not None:
            each = self._bytes // self._shape[0]
            first, last = self.part.start * each, self.part.stop * each
        raw = torch.empty(self._bytes, dtype=torch.uint8)
        target = memoryview(raw.numpy())[first:last]
        done = read_into(target, self._path, self._begin + first)
        if done < len(target):
            raise WrongWeights(
                f"{self._path} ends inside tensor {self._name}: {first + done} of {self._bytes} "
                "bytes are there. Download it again"
            )
        return raw.view(TORCH_DTYPES[self._dtype]).view(self._shape)[index]


def stored_slices(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return name -> tensor of all files, none of them read yet.

    Pickles are mapped; those of PyTorch before 1.6 are read whole: they have no other way.

    Raises:
        ConfigError: a file was changed since its header was checked.
    """
    found: dict[str, Any] = {}
    for file in checkpoint.files:
        path = checkpoint.folder / file
        if path.suffix != ".safetensors":
            mmap = zipfile.is_zipfile(path)
            found |= torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
            continue
        try:
            header, raw = read_header(path)
        except (OSError, ValueError) as error:
            raise ConfigError([str(error)]) from error
        found |= {
            name: StoredSlice(path, name, 8 + len(raw), row)
            for name, row in header.items()
            if name != "__metadata__"
        }
    return found


class Taker(ConversionOps):
    """Takes what transformers has made of one parameter, and hands nothing on."""

    def __init__(self, building: PackedModel, total: int, events: EventLog) -> None:
        self._building, self._events, self._total = building, events, total
        self._done = 0
        self.error: Exception | None = None
        """The first one: transformers notes errors as text and goes on."""

    def convert(
        self, input_dict: dict[str, Any], *, missing_keys: set[str] | None = None, **other: Any
    ) -> dict[str, torch.Tensor]:
        """Pack and place parameters. Buffers are handed on, as they are."""
        kept = {}
        for name, values in input_dict.items():
            value = values[0] if isinstance(values, list) else values
            if self.error is not None:
                continue
            try:
                buffer = self._building.take(name, value)
            except Exception as error:
                self.error = error
                raise
            if buffer is not None:
                kept[name] = buffer
            if missing_keys is not None:
                missing_keys.discard(name)
            self._done += value.nbytes
        self._events.progress(min(self._done, self._total), self._total, "bytes")
        return kept


class Quantiser:
    """Stands where transformers expects a quantiser; has what the loader asks of one."""

    pre_quantized = False

    def __init__(self, taker: Taker) -> None:
        self._taker = taker

    def param_needs_quantization(self, model: Any, name: str) -> bool:
        """Say yes to all: every parameter goes through the taker, as it is stored."""
        return True

    def get_quantize_ops(self) -> Taker:
        """Return the operation at the end of each parameter's way."""
        return self._taker


def packed_model(
    opened: Opened,
    dtype_config: DtypeConfig,
    dtype: torch.dtype,
    place: Place,
    events: EventLog,
    *,
    part: Part | None = None,
    searched: SearchedWeights | None = None,
) -> Read:
    """Load the model with its published weights, packed.

    Args:
        part: the piece that this rank holds of every weight: of others it reads as little as the
            file and transformers allow, and places weights in which nothing else is filled.
        searched: packed weights that are kept already; their tensors are not read.

    Raises:
        ConfigError, WrongWeights: names file and tensor.
    """
    building = PackedModel(
        opened.hf_config, dtype_config, dtype, place, part=part, searched=searched
    )
    model = building.model
    mapping = get_model_conversion_mapping(model, dict(opened.rehearsal.key_mapping) or None)
    slices = tensors_of(opened, building, mapping)
    total = sum(_bytes(each) for each in slices.values())
    taker = Taker(building, total, events)
    bars = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        info, _ = convert_and_load_state_dict_in_model(
            model,
            slices,
            LoadStateDictConfig(hf_quantizer=Quantiser(taker), weight_mapping=mapping),
        )
    finally:
        if bars:
            logging.enable_progress_bar()
    if taker.error is not None:
        raise taker.error
    if info.conversion_errors:
        name, said = next(iter(info.conversion_errors.items()))
        raise WrongWeights(f"{opened.source}: {name} cannot be converted: {said.splitlines()[-1]}")
    if building.waiting:
        raise WrongWeights(
            f"{len(building.waiting)} tensors of {opened.source} were never read "
            f"({first_names(building.waiting)})"
        )
    return Read(
        model=building.finished(),
        samples=building.samples,
        rounding_s=searched.seconds if searched else 0.0,
    )


def tensors_of(opened: Opened, building: PackedModel, mapping: list[Any]) -> dict[str, Any]:
    """Return name -> tensor of the checkpoint, read when indexed, without those not used."""
    if opened.checkpoint is None:
        from zinfer.worker.quantised.gguf import gguf_slices

        return gguf_slices(opened, building.model)
    unused = set(opened.rehearsal.unused)
    found = stored_slices(opened.checkpoint)
    found = {name: each for name, each in found.items() if name not in unused}
    for name, target in targets_of(found, building.model, mapping).items():
        stored = found[name]
        if not isinstance(stored, StoredSlice):
            continue
        if building.is_kept(target.name):
            stored.is_wanted = False
        elif target.is_renamed_only:
            stored.part = building.read_partly(target.name)
    return found


class Target(NamedTuple):
    """The model's tensor that one of a checkpoint becomes, or becomes part of."""

    name: str
    is_renamed_only: bool
    """It is the very same tensor; else transformers fuses, splits or turns it."""


def targets_of(names: Iterable[str], model: Any, mapping: list[Any]) -> dict[str, Target]:
    """Return name in the checkpoint -> what becomes of it."""
    renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
    converters = [each for each in mapping if isinstance(each, WeightConverter)]
    ours = model.state_dict()
    found = {}
    for name in names:
        target, pattern = rename_source_key(
            name, renamings, converters, model.base_model_prefix, ours
        )
        found[name] = Target(target, is_renamed_only=pattern is None)
    return found


def _bytes(stored: Any) -> int:
    return int(stored._bytes) if isinstance(stored, StoredSlice) else int(stored.nbytes)
