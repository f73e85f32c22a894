"""Read a transformers configuration from the catalogue, a folder or the hub, and override it.

Whatever is wrong with it ends in one ValueError that names the file, the field and its value, and
what to set: a value of that file, or model.overrides.
"""

from __future__ import annotations

import contextlib
import copy
import difflib
import importlib.util
import inspect
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model.config_file import read_config_json, shown
from zinfer.model.foreign import facts, guilty_fields, known_values, whole_sentence
from zinfer.model.gguf_file import gguf_fault
from zinfer.model.hub import folder_of, from_pretrained_kwargs, hub_reachable
from zinfer.model.limits import (
    TEXT_PARTS,
    impossible_sizes,
    impossible_together,
    misspelt_sizes,
    sentences,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from zinfer.config import ModelConfig

CATALOGUE_HINT = "Choose a model of the catalogue (zinfer --help lists it), e.g. model=opt-125m"
ROPE_KEYS = ("rope_theta", "rope_scaling")
"""Spellings of config.json that transformers 5 keeps together in `rope_parameters`."""
OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config", "auto_map", "id2label")
SHARED_MODULES = (
    "transformers.configuration_utils",
    "transformers.modeling_rope_utils",
    "transformers.cache_utils",
)
DTYPE_KEYS = ("torch_dtype", "dtype")


def pinned_config(model: ModelConfig) -> PretrainedConfig:
    """Return the architecture of model.model_type with model.overrides as its arguments."""
    if model.model_type is None:
        raise ValueError(
            f"model={model.name} has neither model_type nor source. "
            "Set model.source to a hub id or a local folder"
        )
    _refuse_impossible_sizes(model.overrides, model, None)
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
        _refuse_unknown(model.overrides, default.get_text_config(decoder=True), default.to_dict())
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
        _refuse_impossible_sizes(values, model, source)
    from transformers import AutoConfig

    if folder is not None and written:
        _refuse_nameless(values, model, source)
        _refuse_wrong_kinds(values, model, source)
    _refuse_unknown_dtype(values, model, source)
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
            raise ValueError(_why_not_from_hub(source, error)) from error
        raise refusal(error, model, values=values, source=source) from error
    text = config.get_text_config(decoder=True)
    part = _text_part(written)
    _refuse_misspelt({**part, **overrides}, text, _where(model, source))
    _refuse_unknown(overrides, text, part)
    try:
        for key, value in copy.deepcopy(overrides).items() if not is_overridden else ():
            setattr(text, key, value)
    except Exception as error:
        raise refusal(error, model, values=overrides, defaults=text) from error
    return config


def refuse_impossible_together(config: PretrainedConfig, model: ModelConfig) -> None:
    """Raise ValueError for values that exclude each other, all of them at once."""

    def get(name: str) -> Any:
        with contextlib.suppress(RuntimeError):  # a field that differs from layer to layer
            return getattr(config, name, None)
        return None

    _raise_problems(impossible_together(get), get, model, model.source)


def refusal(
    error: Exception,
    model: ModelConfig,
    *,
    values: Mapping[str, Any],
    source: str | None = None,
    defaults: Any = None,
    doing: str = "",
) -> ValueError:
    """Make the ValueError for an exception of foreign code that met this configuration.

    Args:
        values: the configuration as its user wrote it, overrides included.
        source: the folder or hub id that it was read from; None: the catalogue or overrides alone.
        defaults: an object with the family's own values as attributes, to find what is odd.
        doing: what was being done, e.g. "LlamaForCausalLM cannot be built".
    """
    text = str(error)
    if source and "trust_remote_code" in text and not model.trust_remote_code:
        return ValueError(
            f"{source} brings its own Python code. "
            "If you trust its authors, set model.trust_remote_code=true"
        )
    if source and defaults is None:
        defaults = _defaults(values)
    fields = guilty_fields(error, values, defaults)
    if isinstance(error, ImportError | SyntaxError) and values.get("auto_map"):
        fields = {"auto_map": values["auto_map"]}
    parts = [_where(model, source), facts(fields), doing, whole_sentence(error)]
    known = known_values(fields)
    return ValueError(
        ": ".join(part for part in parts if part)
        + (f" ({known})" if known else "")
        + ". "
        + _advice(error, model, source, list(fields))
    )


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
    defaults = _defaults({"model_type": config.model_type}) if model.model_type else None
    return refusal(error, model, values=values, source=model.source, defaults=defaults, doing=doing)


def _where(model: ModelConfig, source: str | None) -> str:
    if source is None:
        return f"model={model.name}"
    return f"{source}/config.json" if folder_of(source) else f"config.json of {source}"


def _advice(error: BaseException, model: ModelConfig, source: str | None, fields: list[str]) -> str:
    """Say what to set: the overrides for what they hold, the file for what it holds."""
    if "does not recognize this architecture" in str(error):
        return CATALOGUE_HINT
    if isinstance(error, ImportError):
        return "Install the package that this names, in the version that the model's code needs"
    if isinstance(error, SyntaxError):
        return "Correct that code, or get it again"
    if isinstance(error, OSError):
        return f"Get the whole repository of the model again into {source}"
    parts = [_override_name(name) for name in fields]
    roots = list(dict.fromkeys(name for name in parts if name not in TEXT_PARTS))
    if source is None or (roots and all(root in model.overrides for root in roots)):
        names = ", ".join(f"model.overrides.{root}" for root in roots)
        return f"Set another {names}" if names else "Correct model.overrides"
    if not roots:
        return f"Correct {' and '.join(fields) or 'that file'}"
    overrides = ", ".join(f"model.overrides.{root}" for root in roots)
    return f"Correct {', '.join(fields)} in that file, or set {overrides}"


def _override_name(field: str) -> str:
    """Overrides change the text part, by the first name below it."""
    parts = field.split(".")
    return parts[1] if parts[0] in TEXT_PARTS and len(parts) > 1 else parts[0]


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
        written, _ = PretrainedConfig.get_config_dict(source, local_files_only=not hub_reachable())
    except Exception as error:
        raise ValueError(_why_not_from_hub(source, error)) from error
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


def _defaults(values: Mapping[str, Any]) -> Any:
    """Return the family's default configuration, of the text part of a multimodal one."""
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(values["model_type"])
        return default.get_text_config(decoder=True)
    except Exception:  # it is looked at only to explain another error
        return None


def _refuse_impossible_sizes(
    values: Mapping[str, Any], model: ModelConfig, source: str | None
) -> None:
    def get(name: str) -> Any:
        found: Any = values
        for part in name.split("."):
            found = found[part]
        return found

    _raise_problems(impossible_sizes(values), get, model, source)


def _raise_problems(
    problems: dict[str, str], get: Any, model: ModelConfig, source: str | None
) -> None:
    if problems:
        raise ValueError(
            f"{_where(model, source)}: {sentences(problems, get)}. "
            + _advice(ValueError(), model, source, list(problems))
        )


def _refuse_wrong_kinds(values: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Refuse a string or list where the file holds an object: such an error names other fields."""
    wrong = {
        name: values[name]
        for name in (*OBJECTS, *TEXT_PARTS)
        if values.get(name) is not None and not isinstance(values[name], dict)
    }
    if wrong:
        raise ValueError(
            f"{_where(model, source)}: {facts(wrong)}: it must be an object {{...}} or null. "
            + _advice(ValueError(), model, source, list(wrong))
        )


def _refuse_nameless(values: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Refuse a config.json without the one field that decides which model it is."""
    if isinstance(values.get("model_type"), str):
        return
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    classes = values.get("architectures")
    first = str(classes[0]) if isinstance(classes, list) and classes else ""
    names = [
        model_type
        for model_type, name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
        if name == first
    ]
    said = f"is {shown(values['model_type'])}" if "model_type" in values else "is missing"
    own = [name for name in names if first.lower().startswith(name.replace("_", ""))]
    example = [*own, *names, "llama"][0]
    raise ValueError(
        f"{_where(model, source)}: model_type {said}, so which model it is cannot be known. "
        f'Add "model_type": "{example}", or the name of its family'
    )


def _refuse_unknown_dtype(
    values: Mapping[str, Any], model: ModelConfig, source: str | None
) -> None:
    """transformers looks the dtype's name up in torch, and passes on what that raises."""
    import torch

    parts = {"": values} | {
        f"{name}.": values[name] for name in TEXT_PARTS if isinstance(values.get(name), dict)
    }
    wrong = {
        prefix + name: part[name]
        for prefix, part in parts.items()
        for name in DTYPE_KEYS
        if part.get(name) is not None
        and part[name] != "auto"
        and not isinstance(getattr(torch, str(part[name]), None), torch.dtype)
    }
    if wrong:
        raise ValueError(
            f"{_where(model, source)}: {facts(wrong)}, which is no dtype of torch "
            "(float32, float16, bfloat16). "
            + _advice(ValueError(), model, source, list(wrong))
            + '="bfloat16"'
        )


def _refuse_unknown(
    overrides: Mapping[str, Any], config: PretrainedConfig, written: Mapping[str, Any]
) -> None:
    """Refuse an override that the family does not look at: transformers keeps and ignores it."""
    known = {*written, *ROPE_KEYS, *DTYPE_KEYS, *_fields(type(config)), *config.attribute_map}
    problems = []
    for key, value in overrides.items():
        if key in known:
            continue
        close = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
        problems.append(
            f"{config.model_type} has no {key}, so model.overrides.{key}={value} would change "
            "nothing. "
            + (f"Set model.overrides.{close[0]}={value}" if close else f"Leave {key} out")
        )
    if problems:
        raise ValueError("; ".join(problems))


def _refuse_misspelt(values: Mapping[str, Any], config: PretrainedConfig, where: str) -> None:
    problems = misspelt_sizes(values, _fields(type(config)))
    if problems:
        wrong = "; ".join(
            f"{name} is {shown(values[name])}, but {config.model_type} reads {right}"
            for name, right in problems.items()
        )
        right = next(iter(problems.values()))
        raise ValueError(
            f"{where}: {wrong}. Correct the name in that file, or set model.overrides.{right}"
        )


def _fields(config_class: type) -> set[str]:
    """Return the names that a family has or looks for, older spellings included.

    Some are in no class: Qwen3-MoE's code reads head_dim by getattr. So the text of the family's
    modules, and of the shared ones for caches and rotary positions, is searched for names.
    """
    names = {name for name in dir(config_class) if not name.startswith("_")}
    names |= {*getattr(config_class, "__dataclass_fields__", {})}
    names |= {*inspect.signature(config_class).parameters}
    module = config_class.__module__
    for source in {module, module.replace(".configuration_", ".modeling_"), *SHARED_MODULES}:
        names |= {*re.findall(r"""(?:config|self|kwargs)\.(\w+)|["'](\w+)["']""", _text(source))}
    return {name for found in names for name in ([found] if isinstance(found, str) else found)}


def _text(module_name: str) -> str:
    """Return a module's source without importing it; '' where it has none."""
    try:
        found = importlib.util.find_spec(module_name)
        return Path(found.origin).read_text() if found and found.origin else ""
    except (ImportError, OSError, UnicodeDecodeError):
        return ""


def _why_not_from_hub(source: str, error: Exception) -> str:
    text = str(error)
    folder_hint = "give a local folder: model.source=/path/to/a/folder"
    if "trust_remote_code" in text:
        return (
            f"{source} brings its own Python code. "
            "If you trust its authors, set model.trust_remote_code=true"
        )
    if "gated" in text or "401" in text:
        return (
            f"{source} is gated or private on the hub. "
            f"Accept its licence there and set HF_TOKEN, or {folder_hint}"
        )
    if not hub_reachable():
        return (
            f"the hub cannot be reached and {source} is not in its local cache. "
            f"{CATALOGUE_HINT}, or {folder_hint}"
        )
    return (
        f"no model {source} could be read from the hub: {whole_sentence(error)}. "
        f"Correct model.source, or {folder_hint}"
    )
