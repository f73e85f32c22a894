"""Count every weight tensor of a model, with its owner and layer, without allocating storage."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from zinfer.model.config_reading import build_refusal
from zinfer.model.hf import model_class

if TYPE_CHECKING:
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from zinfer.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Parameter:
    """One weight tensor. Tied weights are one parameter, named where it is first met."""

    name: str
    shape: tuple[int, ...]
    numel: int
    module: str
    """Name of the module that owns it."""
    kind: Literal["linear", "embedding", "other"]
    """linear and embedding: the weight of exactly nn.Linear or nn.Embedding.

    DeepSpeed's quantised initialisation replaces these two.
    """
    layer: int | None
    """Index of its decoder layer; None outside (embeddings, final norm, output head)."""
    is_expert: bool
    """True in a routed expert: a token uses only experts_per_token of num_experts."""
    is_transposed: bool = False
    """True for a matrix [in, out], or experts [E, in, out]; others are [out, in]."""
    is_head: bool = False
    """True for the output head, also where the token embedding is the same weight."""


def meta_model(config: PretrainedConfig, model: ModelConfig) -> PreTrainedModel:
    """Build the model without storage. Not by from_config, which enters zero.Init under DeepSpeed.

    Raises:
        ValueError: transformers builds no model of this configuration.
    """
    import torch

    deepspeed_glue = sys.modules.get("transformers.integrations.deepspeed")
    assert deepspeed_glue is None or not deepspeed_glue.is_deepspeed_zero3_enabled(), (
        "count before any HfDeepSpeedConfig is alive"
    )
    cls = model_class(config)
    try:
        with torch.device("meta"):
            return cls(config)
    except Exception as error:  # code of any family: it may raise anything
        raise build_refusal(error, config, model, f"{cls.__name__} cannot be built") from error


def decoder_layers(model: PreTrainedModel, num_layers: int) -> tuple[nn.Module, ...]:
    """Return the decoder layers; none where the model has no list of them."""
    prefix = _layers_prefix(model, num_layers)
    return () if prefix is None else tuple(model.get_submodule(prefix.removesuffix(".")).children())


def weight_tensors(model: PreTrainedModel, num_layers: int) -> tuple[Parameter, ...]:
    """Return every weight of a model with `num_layers` decoder layers, in order of its modules."""
    from torch import nn

    kinds: dict[type, Literal["linear", "embedding"]] = {
        nn.Linear: "linear",
        nn.Embedding: "embedding",
    }
    layers_prefix = _layers_prefix(model, num_layers)
    head = getattr(model.get_output_embeddings(), "weight", None)
    seen: set[int] = set()
    found = []
    for module_name, module in model.named_modules():
        for own_name, tensor in module.named_parameters(recurse=False):
            if id(tensor) in seen:
                continue
            seen.add(id(tensor))
            parents = module_name.split(".")
            in_layer = layers_prefix is not None and module_name.startswith(layers_prefix)
            found.append(
                Parameter(
                    name=f"{module_name}.{own_name}" if module_name else own_name,
                    shape=tuple(tensor.shape),
                    numel=tensor.numel(),
                    module=module_name,
                    kind=kinds.get(type(module), "other") if own_name == "weight" else "other",
                    layer=int(module_name.removeprefix(layers_prefix or "").split(".")[0])
                    if in_layer
                    else None,
                    is_expert="experts" in parents or type(module).__name__.endswith("Experts"),
                    is_transposed=_is_transposed(module, own_name, tensor.dim()),
                    is_head=tensor is head,
                )
            )
    return tuple(found)


def _is_transposed(module: nn.Module, own_name: str, dims: int) -> bool:
    """Tell if this is the weight of GPT-2's Conv1D, or of experts that are built like it."""
    if type(module).__name__ == "Conv1D":
        return own_name == "weight"
    return dims == 3 and bool(getattr(module, "is_transposed", False))


def _layers_prefix(model: PreTrainedModel, num_layers: int) -> str | None:
    """Return the name, with a dot, of the decoder layers: the biggest ModuleList of that length."""
    from torch import nn

    lists = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == num_layers
    }
    if not lists:
        return None
    return (
        max(lists, key=lambda name: sum(tensor.numel() for tensor in lists[name].parameters()))
        + "."
    )
