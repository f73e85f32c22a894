"""What transformers is asked about a model before its weights: configuration, class and tokenizer.

transformers is imported inside the functions: importing this module costs nothing.
"""

from __future__ import annotations

import copy
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model.hub import from_pretrained_kwargs, hub_reachable
from zinfer.model.named import named_model
from zinfer.model.tokenizer import find_tokenizer

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from zinfer.config import ModelConfig

DEFAULT_DTYPE = "float16"
"""The compute dtype where neither the user nor the checkpoint's config names one."""
CATALOGUE_HINT = "Choose a model of the catalogue (zinfer --help lists it), e.g. model=opt-125m"
ROPE_KEYS = ("rope_theta", "rope_scaling")
"""Spellings of config.json that transformers 5 keeps together in `rope_parameters`."""


def load_hf_config(model: ModelConfig) -> PretrainedConfig:
    """The configuration that decides the architecture: `model.source` where it is set, else the pinned values. Without quantisation.

    Of a multimodal model it is the text part.
    """
    config = read_config(model.source, model) if model.source else _pinned_config(model)
    return _causal_lm_part(config, model)


def load_checkpoint_config(
    model: ModelConfig, folder: str | Path | None = None
) -> PretrainedConfig:
    """config.json beside the real weights: in `folder`, else in `model.source`, else on the hub under `model.hub_id`."""
    source = str(folder) if folder else model.source or model.hub_id
    if source is None:
        raise ValueError(
            f"model={model.name} has no published checkpoint. Type weights=dummy, or model=custom model.source=/path"
        )
    return _causal_lm_part(read_config(source, model), model)


def check_pinned(model: ModelConfig, checkpoint_config: PretrainedConfig) -> list[str]:
    """Where the checkpoint's config.json differs from the pinned values, a sentence each. Token ids are not architecture."""
    if model.model_type is None:
        return []
    pinned = _pinned_config(model)
    if checkpoint_config.model_type != pinned.model_type:
        return [
            f"model_type is {pinned.model_type} in conf/model/{model.name}.yaml, {checkpoint_config.model_type} in the checkpoint"
        ]
    differences = []
    for key in model.overrides:
        attribute = (
            "rope_parameters" if key in ROPE_KEYS and hasattr(pinned, "rope_parameters") else key
        )
        ours, theirs = getattr(pinned, attribute), getattr(checkpoint_config, attribute, None)
        if isinstance(ours, dict) and isinstance(theirs, dict):
            theirs = {name: theirs.get(name) for name in ours}
        if ours != theirs and not key.endswith("_token_id"):
            differences.append(
                f"{attribute} is {ours} in conf/model/{model.name}.yaml, {theirs} in the checkpoint's config.json"
            )
    return list(dict.fromkeys(differences))


def model_class(config: PretrainedConfig) -> type[PreTrainedModel]:
    """The class that generates with this configuration: OPT, BLOOM and LLaMA by name, AutoModelForCausalLM's choice for everything else."""
    import transformers
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

    by_model_type = {
        "opt": transformers.OPTForCausalLM,
        "bloom": transformers.BloomForCausalLM,
        "llama": transformers.LlamaForCausalLM,
    }
    if _brings_code(config):
        from transformers.dynamic_module_utils import get_class_from_dynamic_module

        return get_class_from_dynamic_module(
            config.auto_map["AutoModelForCausalLM"], config.name_or_path
        )
    return by_model_type.get(config.model_type) or MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]


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
    from zinfer.model.weights.local import local_folder

    tokenizer, reason = find_tokenizer(chosen, folder or local_folder(chosen))
    if tokenizer is None:
        raise ValueError(f"{reason}. Set model.tokenizer_id to a hub id that has one")
    return tokenizer


def read_config(source: str, model: ModelConfig) -> PretrainedConfig:
    """config.json of a local folder or a hub repository, changed by the overrides of model=custom (elsewhere they are pinned values)."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig

    overrides = model.overrides if source == model.source and model.model_type is None else {}
    is_folder = Path(os.path.expanduser(source)).is_dir()
    if (
        is_folder
        and not model.gguf_file
        and not (Path(os.path.expanduser(source)) / "config.json").is_file()
    ):
        raise ValueError(
            f"{source} has no config.json. Give a folder that has one, or a hub id: model.source=facebook/opt-125m"
        )
    if not is_folder and (source.startswith(("/", "./", "../", "~")) or source.count("/") > 1):
        raise ValueError(
            f"there is no folder {source}. Give an existing one, or a hub id: model.source=facebook/opt-125m"
        )
    try:
        config = AutoConfig.from_pretrained(
            os.path.expanduser(source), **from_pretrained_kwargs(source, model)
        )
    except (OSError, ValueError, KeyError, TypeError, StrictDataclassError) as error:
        raise ValueError(_why_no_config(source, is_folder, error)) from error
    _refuse_misspelt(overrides, config, model)
    text = config.get_text_config(decoder=True)
    for key, value in copy.deepcopy(overrides).items():
        setattr(text, key, value)
    return config


def _pinned_config(model: ModelConfig) -> PretrainedConfig:
    from huggingface_hub.errors import StrictDataclassError
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model.model_type is None:
        raise ValueError(
            f"model={model.name} has neither model_type nor source. Set model.source to a hub id or a local folder"
        )
    if model.model_type not in CONFIG_MAPPING_NAMES:
        close = difflib.get_close_matches(model.model_type, CONFIG_MAPPING_NAMES, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else CATALOGUE_HINT
        raise ValueError(
            f"transformers {__version__} knows no model_type={model.model_type}. {hint}"
        )
    try:
        default = AutoConfig.for_model(model.model_type)
        config = AutoConfig.for_model(
            model.model_type, **copy.deepcopy(model.overrides)
        )  # transformers adds to nested values
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(
            f"model={model.name}: {' '.join(str(error).split())}. Correct model.overrides"
        ) from error
    _refuse_misspelt(model.overrides, default, model)
    return config


def _refuse_misspelt(
    overrides: dict[str, Any], config: PretrainedConfig, model: ModelConfig
) -> None:
    """A key that the configuration lacks but that looks like one that it has. transformers would keep it and ignore it."""
    text = config.get_text_config(decoder=True)
    known = [name for name in dir(text) if not name.startswith("_")]
    for key in overrides:
        close = (
            []
            if hasattr(text, key) or key in ROPE_KEYS
            else difflib.get_close_matches(key, known, n=1, cutoff=0.85)
        )
        if close:
            raise ValueError(
                f"{config.model_type} has no {key}. Type model.overrides.{close[0]}={overrides[key]}"
            )


def _causal_lm_part(config: PretrainedConfig, model: ModelConfig) -> PretrainedConfig:
    """The part of the configuration that AutoModelForCausalLM can build, or a refusal."""
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_CAUSAL_LM_MAPPING,
        MODEL_FOR_MASKED_LM_MAPPING,
    )

    text = config.get_text_config(decoder=True)
    if text is not config and type(text) in MODEL_FOR_CAUSAL_LM_MAPPING:
        text.dtype = text.dtype or config.dtype
        text.tie_word_embeddings = getattr(text, "tie_word_embeddings", config.tie_word_embeddings)
        config = text
    what = None
    if config.is_encoder_decoder:
        what = "an encoder-decoder"
    elif type(config) in MODEL_FOR_MASKED_LM_MAPPING and not getattr(config, "is_decoder", False):
        what = "encoder-only"
    elif type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not _brings_code(config):
        what = "no causal language model"
    if what:
        raise ValueError(
            f"model={model.name}: {model.source or config.model_type} ({config.model_type}) is {what}. {CATALOGUE_HINT}"
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def _brings_code(config: PretrainedConfig) -> bool:
    """Whether the model's class comes with the model: transformers loaded its configuration class under trust_remote_code."""
    auto_map = getattr(config, "auto_map", None) or {}
    return (
        type(config).__module__.startswith("transformers_modules")
        and "AutoModelForCausalLM" in auto_map
    )


def _why_no_config(source: str, is_folder: bool, error: Exception) -> str:
    text = str(error)
    folder_hint = "give a local folder: model.source=/path/to/a/folder"
    if "trust_remote_code" in text:
        return f"{source} brings its own Python code. If you trust its authors, type model.trust_remote_code=true"
    if is_folder:
        return f"{source}/config.json names no model that this transformers knows: {_first_line(error)}. {CATALOGUE_HINT}"
    if "gated" in text or "401" in text:
        return f"{source} is gated or private on the hub. Accept its licence there and set HF_TOKEN, or {folder_hint}"
    if not hub_reachable():
        return f"the hub cannot be reached and {source} is not in its local cache. {CATALOGUE_HINT}, or {folder_hint}"
    return f"no model {source} could be read from the hub: {_first_line(error)}. Correct model.source, or {folder_hint}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".:")[:200]
