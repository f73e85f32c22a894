"""Build a model whose weights are packed one by one, as they come.

The model begins without storage. Each weight is packed, put into its module and handed to `place`,
which partitions or moves it, before the next one is made: the whole model is never in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import PretrainedConfig, initialization

from zinfer.config import DtypeConfig, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.hf import load_hf_config, model_class
from zinfer.model.parameters import weight_tensors
from zinfer.model.quantisable import stored_bits
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.dummy import DummyFiller
from zinfer.model.weights.verified import Samples, is_finite
from zinfer.worker.quantised.modules import SUFFIX, quantise_module
from zinfer.worker.quantised.packing import Packing, pack, rounding_fault
from zinfer.worker.quantised.parts import Part

if TYPE_CHECKING:
    from zinfer.worker.quantised.searched import SearchedWeights

Place = Callable[[nn.Parameter], None]
"""Partitions a parameter, or moves it to its device. All ranks place in one order."""


class PackedModel:
    """A model that is being filled, weight by weight."""

    def __init__(
        self,
        hf_config: PretrainedConfig,
        dtype_config: DtypeConfig,
        dtype: torch.dtype,
        place: Place,
        *,
        part: Part | None = None,
        searched: SearchedWeights | None = None,
    ) -> None:
        self.model = empty_model(hf_config, dtype)
        self.dtype = dtype
        self.samples = Samples(ranks=part.ranks, part=part.rank) if part else Samples(ranks=1)
        self.aliases = _aliases(self.model)
        self.waiting = {names[0] for names in self.aliases.values()}
        """Names of the parameters that have no values yet."""
        self._place, self._part, self._searched = place, part, searched
        self._partly_read: set[str] = set()
        self._first = {name: names[0] for names in self.aliases.values() for name in names}
        self._packings = {
            each.name: Packing.of(each, bits, dtype_config)
            for each in weight_tensors(self.model, hf_config.num_hidden_layers)
            if (bits := stored_bits(each, dtype_config)) is not None
        }

    def packing(self, name: str) -> Packing | None:
        """Return the layout of a parameter; None: it is not packed."""
        return self._packings.get(self._first[name])

    def is_kept(self, name: str) -> bool:
        """Tell if the packed bytes of a tensor are known before it is read."""
        first = self._first.get(name)
        return self._searched is not None and first in self._packings and first in self._searched

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a parameter that has no values yet."""
        return tuple(self.model.get_parameter(self._first[name]).shape)

    def read_partly(self, name: str) -> range | None:
        """Return the part of a tensor's first dimension that is all this rank has to read.

        None: the whole tensor. Whoever asks must hand over the tensor with that part filled.
        """
        first = self._first.get(name)
        if first is None or self._part is None:
            return None
        packing = self._packings.get(first)
        if packing is None:
            found = self._part.slices(self.shape(first), self._kept_dtype(first))
        else:
            found = self._part.indices(packing, self.dtype)
        if found is not None:
            self._partly_read.add(first)
        return found

    def _kept_dtype(self, first: str) -> torch.dtype:
        """Return the type of a parameter that is not packed."""
        return self.model.get_parameter(first).dtype

    def take(self, name: str, value: torch.Tensor) -> torch.Tensor | None:
        """Give a parameter its values, or return those of a buffer in the buffer's type.

        Raises:
            WrongWeights: of another shape than the model's, or as `put` does.
        """
        if name not in self._first:
            buffer = self.model.get_buffer(name)
            _require_shape(name, value, tuple(buffer.shape))
            return value.to(buffer.dtype)
        if self._first[name] in self.waiting:
            _require_shape(name, value, self.shape(name))
            self.put(name, value)
        return None

    def put(self, name: str, value: torch.Tensor) -> None:
        """Give a parameter its values; those of a tied weight once, under any of its names.

        Raises:
            WrongWeights: they are not numbers, or packing them went wrong.
        """
        first = self._first[name]
        if first not in self.waiting:
            return
        self.waiting.discard(first)
        packing = self._packings.get(first)
        if packing is not None and self._searched is not None and self.is_kept(first):
            self._store(first, self._read_packed(first, packing, self._searched), packing)
            return
        if value.dtype == torch.float64:
            value = value.float()  # what is too large for it is infinity from here on
        read: Any = ...
        if first in self._partly_read and (part := self.read_partly(first)) is not None:
            read = slice(part.start, part.stop)
        if not is_finite(value[read]):
            raise WrongWeights(f"tensor {name} holds NaN or infinity")
        if packing is None:
            stored = torch.empty(value.shape, dtype=self._kept_dtype(first))
            stored[read] = value[read]
        else:
            stored = self._packed(name, value, packing)
        self._store(first, stored, packing)

    def _packed(self, name: str, value: torch.Tensor, packing: Packing) -> torch.Tensor:
        """Pack a weight, or this rank's rows of it, and compare them with what was read."""
        rows = self._part.rows(packing, self.dtype) if self._part else None
        stored = pack(value, packing, self.dtype, rows)
        if fault := rounding_fault(value, stored, packing, rows):
            raise WrongWeights(
                f"tensor {name} cannot be held in {packing.bits} bits: {fault}. "
                f"Set dtype.keep=[{self._first[name]}]"
            )
        if self._part is not None and rows is not None:
            self._part.share_scales(stored, packing)
        return stored

    def _read_packed(self, first: str, packing: Packing, searched: SearchedWeights) -> torch.Tensor:
        """Read the kept bytes of a weight, or of this rank's part of it."""
        if self._part is None:
            return packing.stored(searched.read(first, 0, packing.bytes), self.dtype)
        size = self.dtype.itemsize
        span = self._part.span(packing.stored_numel(self.dtype))
        begin, end = (min(packing.bytes, each * size) for each in span)
        raw = torch.empty(packing.bytes, dtype=torch.uint8)
        raw[begin:end] = searched.read(first, begin, end)
        return packing.stored(raw, self.dtype)

    def _store(self, first: str, stored: torch.Tensor, packing: Packing | None) -> None:
        parameter = nn.Parameter(stored, requires_grad=False)
        if packing is not None:
            parameter.zinfer_numbers = _scales_of(packing)
        for alias in self.aliases[first]:
            owner, _, own_name = alias.rpartition(".")
            module = self.model.get_submodule(owner)
            if packing is not None:
                quantise_module(module, own_name, packing, self.dtype)
                own_name += SUFFIX
            module._parameters[own_name] = parameter
        self.samples.note(first + (SUFFIX if packing else ""), stored)
        self._place(parameter)

    def finished(self) -> Any:
        """Return the model. Raises WrongWeights where parameters have no values."""
        if self.waiting:
            raise WrongWeights(f"{len(self.waiting)} tensors were never read")
        return self.model.eval().requires_grad_(False)


def _require_shape(name: str, value: torch.Tensor, wanted: tuple[int, ...]) -> None:
    if tuple(value.shape) != wanted:
        raise WrongWeights(f"{name} is {list(value.shape)}, by config.json it is {list(wanted)}")


def empty_model(hf_config: PretrainedConfig, dtype: torch.dtype) -> Any:
    """Build the model with its buffers, and with parameters that have no storage."""

    def without_storage(module: nn.Module, name: str, parameter: nn.Parameter) -> nn.Parameter:
        return nn.Parameter(parameter.to("meta"), requires_grad=False)

    handle = register_module_parameter_registration_hook(without_storage)
    try:
        with initialization.no_init_weights():
            model = model_class(hf_config)._from_config(hf_config, dtype=dtype)
    finally:
        handle.remove()
    model.tie_weights()
    model.config._experts_implementation = "eager"  # one expert after the other
    return model


def dummy_packed(
    model: ModelConfig,
    dtype_config: DtypeConfig,
    spec: ModelSpec,
    dtype: torch.dtype,
    place: Place,
    events: EventLog,
    *,
    part: Part | None = None,
) -> Any:
    """Build the model with packed random weights: those that it has unquantised, rounded.

    Args:
        part: the piece that this rank holds of every weight: it makes and packs little else.
    """
    building = PackedModel(load_hf_config(model), dtype_config, dtype, place, part=part)
    filler = DummyFiller(spec, events)
    for name in sorted(building.waiting, key=list(building.aliases).index):
        value = torch.empty(building.shape(name), dtype=dtype)
        lent = nn.Parameter(value, requires_grad=False)
        filler.lend(name, lent, building.read_partly(name))
        building.put(name, lent.data)
    return building.finished()


def _aliases(model: nn.Module) -> dict[str, list[str]]:
    """Return first name -> all names of each parameter, in the model's order."""
    found: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        found.setdefault(id(parameter), []).append(name)
    return {names[0]: names for names in found.values()}


def _scales_of(packing: Packing) -> Callable[[torch.Tensor], torch.Tensor]:
    """Return what finds the numbers among a packed weight's bytes: its scales."""
    return lambda packed: packing.split(packed)[1]
