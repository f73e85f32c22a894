"""Read a transformers configuration from the catalogue, a folder or the hub, and override it.

Whatever is wrong with it ends in one ValueError that names the file, the field and its value, and
what to set: a value of that file, or model.overrides.
"""

from __future__ import annotations

import copy
import difflib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model import hub
from zinfer.model.config_checks import (
    DTYPE_KEYS,
    refuse_impossible_sizes,
    refuse_misspelt,
    refuse_nameless,
    refuse_unknown,
    refuse_unknown_dtype,
    refuse_wrong_kinds,
)
from zinfer.model.config_file import read_config_json
from zinfer.model.config_refusals import (
    CATALOGUE_HINT,
    family_defaults,
    refusal,
    why_not_from_hub,
)
from zinfer.model.gguf_file import gguf_fault
from zinfer.model.hub import folder_of, from_pretrained_kwargs
from zinfer.model.limits import TEXT_PARTS

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from zinfer.config import ModelConfig


def pinned_config(model: ModelConfig) -> PretrainedConfig:
    """Return the architecture of model.model_type with model.overrides as its arguments."""
    if model.model_type is None:
        raise ValueError(
            f"model={model.name} has neither model_type nor source. "
            "Set model.source to a hub id or a local folder"
        )
    refuse_impossible_sizes(model.overrides, model, None)
    from transformers import AutoConfig, __version__
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    if model.model_type not in CONFIG_MAPPING_NAMES:
        close = difflib.get_close_matches(model.model_type, CONFIG_MAPPING_NAMES, n=3)
        hint = f"Did you mean {' or '.join(close)}?" if close else CATALOGUE_HINT
        raise ValueError(
            f"transformers {__version__} knows no model_type={model.model_type}. {hint}"
        )
    try:
        default = AutoConfig.for_model(model.model_type)
    except Exception:  # some families have no defaults that pass their own checks
        default = None
    if default is not None:
        refuse_unknown(model.overrides, default.get_text_config(decoder=True), default.to_dict())
    try:
        # a copy, because transformers adds to nested values
        return AutoConfig.for_model(model.model_type, **copy.deepcopy(model.overrides))
    except Exception as error:
        raise refusal(error, model, values=model.overrides, defaults=default) from error


def read_config(source: str, model: ModelConfig) -> PretrainedConfig:
    """Return config.json of a folder or hub repository, changed by the overrides of model=custom.

    Elsewhere `model.overrides` are the pinned values, and change nothing here.
    """
    folder = folder_of(source)
    overrides = model.overrides if source == model.source and model.model_type is None else {}
    written = _written(source, folder, model)
    values = _with_overrides(written, overrides)
    if written or overrides:
        refuse_impossible_sizes(values, model, source)
    from transformers import AutoConfig

    if folder is not None and written:
        refuse_nameless(values, model, source)
        refuse_wrong_kinds(values, model, source)
    refuse_unknown_dtype(values, model, source)
    try:
        is_overridden = overrides and _is_builtin(written)
        config = (
            AutoConfig.for_model(**_standing_alone(values))
            if is_overridden
            else AutoConfig.from_pretrained(
                os.path.expanduser(source), **from_pretrained_kwargs(source, model)
            )
        )
    except Exception as error:
        if folder is not None and model.gguf_file and source == model.source:
            raise ValueError(gguf_fault(folder / model.gguf_file, error)) from error
        if folder is None and not written:
            raise ValueError(why_not_from_hub(source, error)) from error
        raise refusal(error, model, values=values, source=source) from error
    text = config.get_text_config(decoder=True)
    part = _text_part(written)
    refuse_misspelt({**part, **overrides}, text, model, source)
    refuse_unknown(overrides, text, part)
    try:
        for key, value in copy.deepcopy(overrides).items() if not is_overridden else ():
            setattr(text, key, value)
    except Exception as error:
        raise refusal(error, model, values=overrides, defaults=text) from error
    return config


def build_refusal(
    error: Exception, config: PretrainedConfig, model: ModelConfig, doing: str
) -> ValueError:
    """Make the ValueError for an exception that a model's class raised for `config`."""
    values: dict[str, Any] = dict(model.overrides)
    if model.source:
        folder = folder_of(model.source)
        written = _written(model.source, folder, model)
        values = _with_overrides(written, {} if model.model_type else model.overrides)
    values = values or config.to_dict()
    defaults = family_defaults({"model_type": config.model_type}) if model.model_type else None
    return refusal(error, model, values=values, source=model.source, defaults=defaults, doing=doing)


def _written(source: str, folder: Path | None, model: ModelConfig) -> dict[str, Any]:
    """Return config.json as it is written; empty for a gguf file and where it cannot be had."""
    if model.gguf_file and source == model.source:
        return {}
    if folder is not None:
        if not (folder / "config.json").is_file():
            raise ValueError(
                f"{source} has no config.json. "
                "Give a folder that has one, or a hub id: model.source=facebook/opt-125m"
            )
        return read_config_json(folder)
    if source.startswith(("/", "./", "../", "~")) or source.count("/") > 1:
        raise ValueError(
            f"there is no folder {source}. "
            "Give an existing one, or a hub id: model.source=facebook/opt-125m"
        )
    from transformers import PretrainedConfig

    try:
        written, _ = PretrainedConfig.get_config_dict(
            source, local_files_only=not hub.hub_reachable()
        )
    except Exception as error:
        raise ValueError(why_not_from_hub(source, error)) from error
    return written


def _with_overrides(written: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """Return the file's values with the overrides in its text part.

    Fewer layers also shorten the lists that hold one value for each layer.
    """
    if not overrides or not written:
        return {**written, **copy.deepcopy(overrides)}
    values = copy.deepcopy(written)
    part = _text_part(values)
    layers, fewer = part.get("num_hidden_layers"), overrides.get("num_hidden_layers")
    if isinstance(layers, int) and isinstance(fewer, int) and 0 < fewer < layers:
        for name, value in part.items():
            if isinstance(value, list) and len(value) == layers:
                part[name] = value[:fewer]
    if any(name in overrides for name in DTYPE_KEYS):
        for name in DTYPE_KEYS:
            part.pop(name, None)
    part.update(copy.deepcopy(overrides))
    return values


def _text_part(values: dict[str, Any]) -> dict[str, Any]:
    """Return the part of config.json that describes the language model: most often all of it."""
    return next((values[name] for name in TEXT_PARTS if isinstance(values.get(name), dict)), values)


def _is_builtin(written: dict[str, Any]) -> bool:
    """Return whether transformers itself has the configuration's class."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

    return written.get("model_type") in CONFIG_MAPPING_NAMES and "auto_map" not in written


def _standing_alone(values: dict[str, Any]) -> dict[str, Any]:
    """Leave out what belongs to the file and not to the architecture."""
    return {name: value for name, value in values.items() if name != "_name_or_path"}
