"""Read a GGUF file tensor by tensor, by the names that transformers gives them.

GGUF weights are mostly packed already, in other schemes. Each tensor is unpacked when it is indexed
and packed again in ours. Families whose tensors transformers splits or fuses, as it does experts,
are read whole: there one tensor of the file is not one of the model.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
from transformers import modeling_gguf_pytorch_utils as glue

from zinfer.config import ConfigError
from zinfer.model.gguf_file import gguf_fault, gguf_path
from zinfer.model.weights.pretrained import Opened, unreachable

ONE_TO_ONE = (
    glue.TensorProcessor,
    glue.LlamaTensorProcessor,
    glue.BloomTensorProcessor,
    glue.NemotronTensorProcessor,
    glue.Gemma2TensorProcessor,
)
"""Families of which each tensor in the file is one of the model."""


class GgufSlice:
    """One tensor of a GGUF file, unpacked when it is indexed."""

    def __init__(self, tensor: Any, processor: Any) -> None:
        self._tensor, self._processor = tensor, processor
        self.nbytes = 4 * math.prod(int(size) for size in tensor.shape)
        """Once unpacked, in float32."""

    def __getitem__(self, index: Any) -> torch.Tensor:
        """Unpack it."""
        from gguf import dequantize

        values = dequantize(self._tensor.data, self._tensor.tensor_type)
        done = self._processor.process(weights=values, name=self._tensor.name)
        return torch.from_numpy(np.array(done.weights, dtype=np.float32))[index]


def gguf_slices(opened: Opened, model: Any) -> dict[str, Any]:
    """Return the model's name -> tensor of the file, none of them unpacked yet where possible.

    Raises:
        ConfigError: the file cannot be read.
    """
    from gguf import GGUFReader

    try:
        path = gguf_path(opened.model, opened.source)
    except OSError as error:
        raise ConfigError([unreachable(opened.model, opened.source, error)]) from error
    try:
        reader = GGUFReader(path)
        parsed = glue.load_gguf_checkpoint(path)
    except Exception as error:  # the reader's own checks are few: a damaged file fails in any way
        raise ConfigError([gguf_fault(path, error)]) from error
    architecture = str(glue.read_field(reader, "general.architecture")[0])
    kind = glue.TENSOR_PROCESSORS.get(architecture, glue.TensorProcessor)
    if kind not in ONE_TO_ONE:
        whole = glue.load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)
        found: dict[str, Any] = whole["tensors"]
        return found
    processor = kind(config=parsed.get("config", {}))
    names = glue.get_gguf_hf_weights_map(model, processor)
    return {
        names[tensor.name]: GgufSlice(tensor, processor)
        for tensor in reader.tensors
        if tensor.name in names
    }
