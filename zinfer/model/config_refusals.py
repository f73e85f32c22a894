"""Say why a model's configuration cannot be used: where it is written, what is odd, what to set."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from zinfer.model import hub
from zinfer.model.foreign import facts, guilty_fields, known_values, whole_sentence
from zinfer.model.hub import folder_of
from zinfer.model.limits import TEXT_PARTS

if TYPE_CHECKING:
    from zinfer.config import ModelConfig

CATALOGUE_HINT = "Choose a model of the catalogue (zinfer --help lists it), e.g. model=opt-125m"


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
        defaults = family_defaults(values)
    fields = guilty_fields(error, values, defaults)
    if isinstance(error, ImportError | SyntaxError) and values.get("auto_map"):
        fields = {"auto_map": values["auto_map"]}
    parts = [where(model, source), facts(fields), doing, whole_sentence(error)]
    known = known_values(fields)
    return ValueError(
        ": ".join(part for part in parts if part)
        + (f" ({known})" if known else "")
        + ". "
        + advice(error, model, source, list(fields))
    )


def where(model: ModelConfig, source: str | None) -> str:
    """Name what holds the configuration: the model of the catalogue, or the file."""
    if source is None:
        return f"model={model.name}"
    return f"{source}/config.json" if folder_of(source) else f"config.json of {source}"


def advice(error: BaseException, model: ModelConfig, source: str | None, fields: list[str]) -> str:
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
    """Name the override that changes a field: they change the text part, by its first name."""
    parts = field.split(".")
    return parts[1] if parts[0] in TEXT_PARTS and len(parts) > 1 else parts[0]


def family_defaults(values: Mapping[str, Any]) -> Any:
    """Return the family's default configuration, of the text part of a multimodal one."""
    from transformers import AutoConfig

    try:
        default = AutoConfig.for_model(values["model_type"])
        return default.get_text_config(decoder=True)
    except Exception:  # it is looked at only to explain another error
        return None


def why_not_from_hub(source: str, error: Exception) -> str:
    """Say why the hub gave no configuration, with what to do."""
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
    if not hub.hub_reachable():
        return (
            f"the hub cannot be reached and {source} is not in its local cache. "
            f"{CATALOGUE_HINT}, or {folder_hint}"
        )
    return (
        f"no model {source} could be read from the hub: {whole_sentence(error)}. "
        f"Correct model.source, or {folder_hint}"
    )
