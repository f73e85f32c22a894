"""Read parts of a model from its checkpoint, one after the other, so that it is never whole."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any

import torch
from accelerate import init_empty_weights
from safetensors import safe_open
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    convert_and_load_state_dict_in_model,
    rename_source_key,
)
from transformers.modeling_utils import LoadStateDictConfig
from transformers.utils import logging

from zinfer.model.hf import model_class
from zinfer.model.weights.checkpoint import WrongWeights, first_names
from zinfer.model.weights.pretrained import Opened

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class PartReader:
    """A model without weights, whose parts are filled from a checkpoint and emptied again.

    transformers renames, fuses and splits a part's tensors as it does for a whole model.
    Everything is float32.
    """

    def __init__(self, opened: Opened, files: ExitStack) -> None:
        """Build the model and open the files; `files` closes them.

        No HfDeepSpeedConfig may be alive: it would have transformers partition the model.
        """
        assert opened.checkpoint is not None
        with init_empty_weights(include_buffers=False):
            model = model_class(opened.hf_config)(opened.hf_config)
        self.model: PreTrainedModel = model.float().eval().requires_grad_(False)
        self._mapping = dict(opened.rehearsal.key_mapping)
        self._values: dict[str, Any] = {}
        for name in opened.checkpoint.files:
            file = files.enter_context(safe_open(opened.checkpoint.folder / name, "pt"))
            self._values |= {key: file.get_slice(key) for key in file.keys()}  # noqa: SIM118
        self._sources = self._sources_of_targets(set(opened.rehearsal.unused))

    @contextmanager
    def filled(self, wanted: Callable[[str], bool]) -> Iterator[None]:
        """Read the parameters of these names, as the model names them, for a block.

        Raises:
            WrongWeights: some of them are not in the checkpoint.
        """
        sources = [key for key, target in self._sources.items() if wanted(target)]
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

    def _sources_of_targets(self, unused: set[str]) -> dict[str, str]:
        """Return each of the checkpoint's names -> the (first) parameter that is made of it."""
        mapping = self._weight_mapping()
        renamings = [each for each in mapping if isinstance(each, WeightRenaming)]
        converters = [each for each in mapping if isinstance(each, WeightConverter)]
        own = self.model.state_dict()
        prefix = self.model.base_model_prefix
        return {
            key: rename_source_key(key, renamings, converters, prefix, own)[0]
            for key in self._values
            if key not in unused
        }

    def _weight_mapping(self) -> list[Any]:
        return get_model_conversion_mapping(self.model, key_mapping=self._mapping or None)
