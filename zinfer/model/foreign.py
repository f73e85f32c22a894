"""Turn an exception of transformers, torch or a model's own code into a sentence for its user.

Such code raises anything, often without the value that is wrong. The sentence here keeps all that
it said, and adds the fields of the configuration that it speaks of, with their values.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any

from zinfer.model.config_file import shown

ROPE_FIELDS = ("rope_parameters", "rope_scaling")
ALIASES = {
    "padding_idx": "pad_token_id",
    "embed_dim": "hidden_size",
    "num_heads": "num_attention_heads",
}
"""Names that the code of some models uses for a field."""
MOST_FIELDS = 4


def whole_sentence(error: BaseException) -> str:
    """Return everything that `error` says on one line, led by its type where that adds to it.

    A bare `'su'` of a KeyError says nothing without its type; an OSError's sentence stands alone.
    """
    text = " ".join(str(error).split()).rstrip(".: ")
    if not text:
        return type(error).__name__
    speaks = isinstance(error, ValueError | OSError) or type(error).__name__.startswith("Strict")
    return text if speaks else f"{type(error).__name__}: {text}"


def guilty_fields(
    error: BaseException, values: Mapping[str, Any], defaults: Any = None
) -> dict[str, Any]:
    """Return the fields that `error` is about, with their values; empty where none is known.

    Looked for in this order, and the first that finds any decides:
    fields that the sentence names, fields whose value it names, fields that are unlike the default.

    Args:
        values: the configuration as its user wrote it, nested dicts included.
        defaults: an object with the family's default values as attributes.
    """
    text, fields = str(error), dict(_flat(values))
    words = set(re.findall(r"[\w.\-]+", text)) | {
        alias for word, alias in ALIASES.items() if word in text.lower()
    }
    named = {
        name: value
        for name, value in fields.items()
        if ((leaf := name.split(".")[-1]) in words and leaf.isidentifier())
        or ("_" in leaf and leaf.replace("_", " ") in text)
    }
    if any(word in ROPE_FIELDS or word == "rope_type" for word in words):
        named |= {name: value for name, value in fields.items() if name.startswith(ROPE_FIELDS)}
        named = {name: value for name, value in named.items() if not isinstance(value, list)}
    if named:
        return _first_fields(named)
    quoted = set(re.findall(r"['`]([^'`]+)['`]", text))
    valued = {
        name: value for name, value in fields.items() if isinstance(value, str) and value in quoted
    }
    return _first_fields(
        valued
        or {
            name: value
            for name, value in fields.items()
            if _is_odd(name.split(".")[-1], value, values, defaults)
        }
    )


def known_values(fields: Mapping[str, Any]) -> str:
    """Return what may stand there instead, for activations and rotary positions, else ''."""
    for name, value in fields.items():
        leaf = name.split(".")[-1]
        if not isinstance(value, str):
            continue
        if "act" in leaf.split("_") or "activation" in leaf:
            from transformers.activations import ACT2FN

            if value not in ACT2FN:
                close = difflib.get_close_matches(value, list(ACT2FN), n=3) or list(ACT2FN)
                return f"transformers knows {', '.join(close)}"
        if leaf in ("type", "rope_type") and name.startswith(ROPE_FIELDS):
            from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

            if value not in ROPE_INIT_FUNCTIONS:
                return f"transformers knows {', '.join(sorted({'default', *ROPE_INIT_FUNCTIONS}))}"
    return ""


def _flat(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in values.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def _first_fields(fields: dict[str, Any]) -> dict[str, Any]:
    return dict(list(fields.items())[:MOST_FIELDS])


def _is_odd(name: str, value: Any, values: Mapping[str, Any], defaults: Any) -> bool:
    """Tell if a value is of another sort than the family's default, or no size at all."""
    if name.endswith("_token_id"):
        vocab_size = values.get("vocab_size")
        return isinstance(value, int) and isinstance(vocab_size, int) and value >= vocab_size
    if isinstance(value, str) and _is_number(value):
        return True
    if isinstance(value, int | float) and not isinstance(value, bool) and not abs(value) <= 1e12:
        return True
    default = _attribute(defaults, name)
    if isinstance(default, bool) or not isinstance(default, int | float):
        return isinstance(value, int) and value < 1 and name.startswith(("num_", "n_"))
    if isinstance(value, bool) or not isinstance(value, int | float):
        return True
    return value <= 0 < default


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _attribute(defaults: Any, name: str) -> Any:
    try:
        found = getattr(defaults, name, None)
        if found is None and name == "rope_theta":
            found = 10000.0  # moved into rope_parameters by transformers 5
    except RuntimeError:  # differs from layer to layer
        return None
    return found


def facts(fields: Mapping[str, Any]) -> str:
    """Join fields and values: 'hidden_size is "64", ...'."""
    return ", ".join(f"{name} is {shown(value)}" for name, value in fields.items())
