"""Refuse what cannot run whatever the memory: a model that is none, or a batch beyond it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

from zinfer.config import RunConfig
from zinfer.model.spec import ModelSpec
from zinfer.plan.kv_placement import kv_problems

FIXED_POSITION_FAMILIES = frozenset({"codegen", "ctrl", "gptj", "mpt"})
"""Families with a buffer, not a parameter, of one row per position: transformers 5.23 fails beyond
it. Learned tables are seen among the parameters."""
POSITION_OFFSETS = (0, 2)
"""Rows that a table of positions has beyond max_positions. OPT and BioGPT keep two in front."""


def spec_problems(spec: ModelSpec, config: RunConfig) -> list[str]:
    """List every reason why this model cannot generate this batch, with what to set instead."""
    return [
        *_size_problems(spec),
        *_position_problems(spec, config),
        *_text_problems(spec, config),
        *kv_problems(spec, config),
    ]


def _size_problems(spec: ModelSpec) -> Iterator[str]:
    """List sizes with which no layer can be built."""
    at_least = {
        "num_hidden_layers": (spec.num_layers, 1),
        "hidden_size": (spec.hidden_size, 1),
        "vocab_size": (spec.vocab_size, 2),
    }
    for name, (value, least) in at_least.items():
        if value < least:
            yield (
                f"model={spec.name} has {name}={value}: at least {least} is needed. "
                f"Set model.overrides.{name}, or correct the model's config.json"
            )
    heads, kv_heads = spec.num_attention_heads, spec.num_kv_heads
    if heads < 0 or kv_heads < 0 or (heads and (kv_heads == 0 or heads % kv_heads)):
        yield (
            f"model={spec.name} has {heads} attention heads and {kv_heads} heads of keys and "
            f"values: the second must divide the first. "
            f"Set model.overrides.num_key_value_heads={max(1, heads)}"
        )


def last_position(config: RunConfig) -> int:
    """Return the positions of one sequence. The last new token is chosen and never fed back."""
    return config.batch.prompt_tokens + config.batch.new_tokens - 1


def has_position_table(spec: ModelSpec) -> bool:
    """Tell if each position is a row of a table, so that none exists beyond max_positions."""
    if spec.max_positions is None:
        return False
    rows = {spec.max_positions + offset for offset in POSITION_OFFSETS}
    learned = any(
        len(parameter.shape) == 2
        and parameter.shape[0] in rows
        and ("wpe" in parameter.name or "position" in parameter.name)
        for parameter in spec.parameters
    )
    return learned or spec.model_type in FIXED_POSITION_FAMILIES


def _position_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Refuse more tokens than a table of positions has rows. Rotary positions have no such end."""
    last, most = last_position(config), spec.max_positions
    if most is None or last <= most or not has_position_table(spec):
        return
    prompt, new = config.batch.prompt_tokens, config.batch.new_tokens
    fitting = most + 1 - new
    advice = (
        f"batch.prompt_tokens={fitting}"
        if fitting >= 1
        else f"batch.new_tokens={max(2, most + 1 - prompt)}"
        if most + 1 - prompt >= 2
        else f"batch.prompt_tokens={most // 2} batch.new_tokens={most - most // 2}"
    )
    yield (
        f"batch.prompt_tokens={prompt} and batch.new_tokens={new} need {last} positions, "
        f"{spec.name} has {most}. Set {advice}"
    )


def _text_problems(spec: ModelSpec, config: RunConfig) -> Iterator[str]:
    """Refuse a tokenizer in the model's folder with tokens that the model has no embedding for."""
    if config.batch.prompt == "synthetic" or not config.model.source:
        return
    path = Path(config.model.source).expanduser() / "tokenizer.json"
    size = tokenizer_size(path)
    if size is not None and size > spec.vocab_size:
        yield (
            f"{path} has {size:,} tokens, {spec.name} embeds {spec.vocab_size:,}: a prompt of text "
            "would ask for rows that are not there. Set batch.prompt=synthetic, or use the "
            "model's own tokenizer"
        )


def tokenizer_size(path: Path) -> int | None:
    """Count the tokens of a tokenizer.json without added special ones. None: nothing to read."""
    try:
        vocabulary = json.loads(path.read_text(encoding="utf-8"))["model"]["vocab"]
        ids = vocabulary.values() if isinstance(vocabulary, dict) else range(len(vocabulary))
        return max(ids, default=-1) + 1
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
