"""Refuse values of a model's configuration that transformers ignores, or fails on elsewhere."""

from __future__ import annotations

import contextlib
import difflib
import importlib.util
import inspect
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.model.config_file import shown
from zinfer.model.config_refusals import advice, where
from zinfer.model.foreign import facts
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

ROPE_KEYS = ("rope_theta", "rope_scaling")
"""Spellings of config.json that transformers 5 keeps together in `rope_parameters`."""
OBJECTS = ("rope_scaling", "rope_parameters", "quantization_config", "auto_map", "id2label")
SHARED_MODULES = (
    "transformers.configuration_utils",
    "transformers.modeling_rope_utils",
    "transformers.cache_utils",
)
DTYPE_KEYS = ("torch_dtype", "dtype")


def refuse_impossible_sizes(
    values: Mapping[str, Any], model: ModelConfig, source: str | None
) -> None:
    """Raise ValueError for sizes that no model can have, all of them at once."""

    def get(name: str) -> Any:
        found: Any = values
        for part in name.split("."):
            found = found[part]
        return found

    _raise_problems(impossible_sizes(values), get, model, source)


def refuse_impossible_together(config: PretrainedConfig, model: ModelConfig) -> None:
    """Raise ValueError for values that exclude each other, all of them at once."""

    def get(name: str) -> Any:
        with contextlib.suppress(RuntimeError):  # a field that differs from layer to layer
            return getattr(config, name, None)
        return None

    _raise_problems(impossible_together(get), get, model, model.source)


def _raise_problems(
    problems: dict[str, str], get: Any, model: ModelConfig, source: str | None
) -> None:
    if problems:
        raise ValueError(
            f"{where(model, source)}: {sentences(problems, get)}. "
            + advice(ValueError(), model, source, list(problems))
        )


def refuse_wrong_kinds(values: Mapping[str, Any], model: ModelConfig, source: str) -> None:
    """Refuse a string or list where the file holds an object: such an error names other fields."""
    wrong = {
        name: values[name]
        for name in (*OBJECTS, *TEXT_PARTS)
        if values.get(name) is not None and not isinstance(values[name], dict)
    }
    if wrong:
        raise ValueError(
            f"{where(model, source)}: {facts(wrong)}: it must be an object {{...}} or null. "
            + advice(ValueError(), model, source, list(wrong))
        )


def refuse_nameless(values: Mapping[str, Any], model: ModelConfig, source: str) -> None:
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
        f"{where(model, source)}: model_type {said}, so which model it is cannot be known. "
        f'Add "model_type": "{example}", or the name of its family'
    )


def refuse_unknown_dtype(values: Mapping[str, Any], model: ModelConfig, source: str | None) -> None:
    """Refuse a dtype that torch has not: transformers would pass on what looking it up raises."""
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
            f"{where(model, source)}: {facts(wrong)}, which is no dtype of torch "
            "(float32, float16, bfloat16). "
            + advice(ValueError(), model, source, list(wrong))
            + '="bfloat16"'
        )


def refuse_unknown(
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


def refuse_misspelt(
    values: Mapping[str, Any], config: PretrainedConfig, model: ModelConfig, source: str
) -> None:
    """Refuse sizes under names that the family does not read: it would use its own default."""
    problems = misspelt_sizes(values, _fields(type(config)))
    if problems:
        wrong = "; ".join(
            f"{name} is {shown(values[name])}, but {config.model_type} reads {right}"
            for name, right in problems.items()
        )
        right = next(iter(problems.values()))
        raise ValueError(
            f"{where(model, source)}: {wrong}. "
            f"Correct the name in that file, or set model.overrides.{right}"
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
