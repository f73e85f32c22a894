"""Configure a model before its weights: its configuration, its class and its tokenizer.

transformers is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.model.config_checks import ROPE_KEYS, refuse_impossible_together
from zinfer.model.config_reading import pinned_config, read_config
from zinfer.model.config_refusals import CATALOGUE_HINT
from zinfer.model.foreign import whole_sentence
from zinfer.model.named import named_model
from zinfer.model.tokenizer import find_tokenizer
from zinfer.model.weights.local import local_folder

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from zinfer.config import ModelConfig

DEFAULT_DTYPE = "float16"
"""The compute dtype where neither the user nor the checkpoint's config names one."""


def load_model_config(model: str | ModelConfig) -> PretrainedConfig:
    """Return the configuration that decides this model's architecture, before any weight exists.

    This is the published way to configure a model for ZeRO-Inference, as one function. Memory can
    be estimated and ZeRO-3's buffers sized from what comes back: hidden size, layers, heads.

    1. The base is the architecture that the catalogue pins (no network), or AutoConfig of the
       folder or hub id. OPT-175B is on no hub: it is OPT-66B plus five overrides.
    2. Overrides change it, and `model_type` decides the class: `config.architectures[0]`.
    3. `dtype` is the checkpoint's own, and float16 where its config names none.

    Of a multimodal model the text part comes back, and quantisation is left out.

    Args:
        model: a name of the catalogue ("opt-175b"), a folder with a config.json, a hub id
            ("facebook/opt-125m"), or a composed ModelConfig (`compose(...).model`).

    Raises:
        ValueError: with the file, the field and its value, and with what to set instead.
    """
    chosen = named_model(model) if isinstance(model, str) else model
    config = load_hf_config(chosen)
    config.architectures = [model_class(config).__name__]
    config.dtype = chosen.checkpoint_dtype or config.dtype or DEFAULT_DTYPE
    return config


def load_tokenizer(
    model: str | ModelConfig, folder: str | Path | None = None
) -> PreTrainedTokenizerBase:
    """Return the model's tokenizer: padding token = end-of-sequence token, padding on the left.

    A model without a tokenizer of its own borrows a compatible one: OPT-175B that of OPT-66B.

    Args:
        model: as in load_model_config.
        folder: read the tokenizer from this folder instead.

    Raises:
        ValueError: the model names no tokenizer, or it cannot be read, with the reason.
    """
    chosen = named_model(model) if isinstance(model, str) else model
    tokenizer, reason = find_tokenizer(chosen, folder or local_folder(chosen))
    if tokenizer is None:
        raise ValueError(f"{reason}. Set model.tokenizer_id to a hub id that has one")
    return tokenizer


def load_hf_config(model: ModelConfig) -> PretrainedConfig:
    """Return the configuration of `model.source` if it is set, else the pinned architecture.

    Quantisation is left out, and of a multimodal model only the text part is returned.
    """
    return causal_config(model)[0]


def causal_config(model: ModelConfig) -> tuple[PretrainedConfig, str | None]:
    """Return what load_hf_config does, and the model_type of the multimodal model it is part of.

    The second is None for a model that is text only.
    """
    whole = read_config(model.source, model) if model.source else pinned_config(model)
    config = _causal_lm_part(whole, model)
    return config, None if config is whole else whole.model_type


def load_checkpoint_config(
    model: ModelConfig, folder: str | Path | None = None
) -> PretrainedConfig:
    """Return the configuration beside the real weights.

    It is read from `folder`, else from `model.source`, else from the hub under `model.hub_id`.
    """
    source = str(folder) if folder else model.source or model.hub_id
    if source is None:
        raise ValueError(
            f"model={model.name} has no published checkpoint. "
            "Set weights=dummy, or model=custom model.source=/path"
        )
    return _causal_lm_part(read_config(source, model), model)


def check_pinned(model: ModelConfig, checkpoint_config: PretrainedConfig) -> list[str]:
    """Say where the checkpoint's config.json differs from the pinned values, a sentence each.

    Token ids are no architecture: they may differ.
    """
    if model.model_type is None:
        return []
    pinned = pinned_config(model)
    file = f"conf/model/{model.name}.yaml"
    if checkpoint_config.model_type != pinned.model_type:
        return [
            f"model_type is {pinned.model_type} in {file}, "
            f"{checkpoint_config.model_type} in the checkpoint"
        ]
    differences = []
    for key in model.overrides:
        is_rope = key in ROPE_KEYS and hasattr(pinned, "rope_parameters")
        attribute = "rope_parameters" if is_rope else key
        ours, theirs = getattr(pinned, attribute), getattr(checkpoint_config, attribute, None)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            theirs = {name: theirs.get(name) for name in ours}
        if ours != theirs and not key.endswith("_token_id"):
            differences.append(
                f"{attribute} is {ours} in {file}, {theirs} in the checkpoint's config.json"
            )
    return list(dict.fromkeys(differences))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """Return the class that generates with this configuration.

    OPT, BLOOM and LLaMA by name, and for everything else what AutoModelForCausalLM would choose.

    Raises:
        ValueError: the model brings Python code, and it cannot be imported.
    """
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    by_model_type = {
        "opt": transformers.OPTForCausalLM,
        "bloom": transformers.BloomForCausalLM,
        "llama": transformers.LlamaForCausalLM,
    }
    if _brings_code(config):
        return _class_of_own_code(config)
    if config.model_type in by_model_type:
        return by_model_type[config.model_type]
    if type(config) in MODEL_FOR_CAUSAL_LM_MAPPING:
        return MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    found = _class_for_text_part(config)
    assert found is not None, "_causal_lm_part refuses configurations without a class"
    return found


def _class_for_text_part(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """Find the causal class whose config_class is exactly this one, in the family's own module.

    AutoModelForCausalLM lists such classes under the multimodal configuration (Mllama, Emu3).
    """
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    module_name = type(config).__module__.replace(".configuration_", ".modeling_")
    try:
        module = import_module(module_name)
    except ImportError:
        return None
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values():
        found = getattr(module, name, None) if isinstance(name, str) else None
        if found is not None and found.config_class is type(config):
            return found
    return None


def _causal_lm_part(config: PretrainedConfig, model: ModelConfig) -> PretrainedConfig:
    """Return the part of the configuration that a causal language model is built from.

    Raises:
        ValueError: there is no such part, or its values exclude each other.
    """
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    text = config.get_text_config(decoder=True)
    whole = config
    if (
        text is not config
        and not config.is_encoder_decoder
        and (type(text) in MODEL_FOR_CAUSAL_LM_MAPPING or _class_for_text_part(text) is not None)
    ):
        text.dtype = text.dtype or config.dtype
        if not hasattr(text, "tie_word_embeddings"):
            text.tie_word_embeddings = getattr(config, "tie_word_embeddings", True)
        config = text
    what = None
    if config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "encoder-only"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (
        _brings_code(config) or _class_for_text_part(config) is not None
    ):
        what = "no causal language model"
        if text is not whole:
            what = f"multimodal, and transformers has no causal class for its {text.model_type}"
    if what:
        raise ValueError(
            f"model={model.name}: {model.source or whole.model_type} ({whole.model_type}) "
            f"is {what}. {CATALOGUE_HINT}"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    refuse_impossible_together(config, model)
    return config


def _brings_code(config: PretrainedConfig) -> bool:
    """Return whether transformers loaded this class from the model under trust_remote_code."""
    auto_map = getattr(config, "auto_map", None) or {}
    return (
        type(config).__module__.startswith("transformers_modules")
        and "AutoModelForCausalLM" in auto_map
    )


def _class_of_own_code(config: PretrainedConfig) -> type[PreTrainedModel]:
    from transformers import __version__
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    reference = config.auto_map["AutoModelForCausalLM"]
    try:
        return get_class_from_dynamic_module(reference, config.name_or_path)
    except Exception as error:  # code of somebody else: it may raise anything
        written_for = getattr(config, "transformers_version", None) or "another version"
        raise ValueError(
            f"{config.name_or_path}: its code {reference} cannot be imported: "
            f"{whole_sentence(error)}. Install the package that this names; if it is transformers, "
            f"the code was written for {written_for} and not for {__version__}"
        ) from error
