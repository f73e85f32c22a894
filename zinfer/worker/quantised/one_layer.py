"""Read parts of a model from its checkpoint, one after the other, so that it is never whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from zinfer.model.hf import model_class
from zinfer.model.weights.checkpoint import WrongWeights, first_names
from zinfer.model.weights.pretrained import Opened
from zinfer.model.weights.verified import is_finite
from zinfer.worker.quantised.loading import stored_slices, targets_of

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PartReader:
    """A model without weights, whose parts are filled from a checkpoint and emptied again.

    transformers renames, fuses and splits a part's tensors as it does for a whole model.
    Everything is float32.
    """

    def __init__(self, opened: Opened) -> None:
        """Build the model, and read what the files' headers say.

        No HfDeepSpeedConfig may be alive: it would have transformers partition the model.
        """
        assert opened.checkpoint is not None
        with init_empty_weights(include_buffers=False):
            model = model_class(opened.hf_config)(opened.hf_config)
        self.model: PreTrainedModel = model.float().eval().requires_grad_(False)
        self._mapping = dict(opened.rehearsal.key_mapping)
        unused = set(opened.rehearsal.unused)
        found = stored_slices(opened.checkpoint)
        self._values = {name: each for name, each in found.items() if name not in unused}
        self._sources = targets_of(self._values, self.model, self._weight_mapping())

    @contextmanager
    def filled(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Read the parameters of these names, as the model names them, for a block.

        Raises:
            WrongWeights: some of them are not in the checkpoint, or are no numbers.
        """
        sources = [key for key, target in self._sources.items() if wanted(target.name)]
        quiet, bars = logging.get_verbosity(), logging.is_progress_bar_enabled()
        logging.set_verbosity_error()
        logging.disable_progress_bar()
        try:
            info, _ = convert_and_load_state_dict_in_model(
                self.model,
                {key: self._values[key] for key in sources},
                LoadStateDictConfig(dtype=torch.float32, weight_mapping=self._weight_mapping()),
            )
        finally:
            logging.set_verbosity(quiet)
            if bars:
                logging.enable_progress_bar()
        lacking = [
            name
            for name, parameter in self.model.named_parameters()
            if parameter.is_meta and wanted(name)
        ]
        if lacking or info.conversion_errors:
            said = "; ".join(str(error) for error in info.conversion_errors.values())
            raise WrongWeights(f"{first_names(lacking)} could not be read. {said}")
        for name, parameter in self.model.named_parameters():
            if wanted(name) and not is_finite(parameter):
                raise WrongWeights(f"tensor {name} holds NaN or infinity")
        try:
            yield
        finally:
            self._empty(wanted)

    def _empty(self, wanted: Callable[[str], bool]) -> None:
        """Give the memory of these parameters back."""
        for path, module in self.model.named_modules():
            for name, parameter in list(module._parameters.items()):
                if parameter is not None and wanted(f"{path}.{name}" if path else name):
                    empty = torch.empty_like(parameter, device="meta")
                    module._parameters[name] = torch.nn.Parameter(empty, requires_grad=False)

    def _weight_mapping(self) -> list[Any]:
        return get_model_conversion_mapping(self.model, key_mapping=self._mapping or None)
