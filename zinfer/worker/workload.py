"""Make prompts of exactly prompt_tokens tokens: the same rows however many ranks share them."""

from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import torch

from zinfer.config import BatchConfig, ConfigError
from zinfer.model.tokenizer import require_embedded
from zinfer.paths import given_file

FIRST_ORDINARY_ID = 4
"""Below it are special tokens (padding, begin, end, unknown) of the catalogue's models."""


def prompt_ids(batch: BatchConfig, vocab_size: int, tokenizer: Any | None) -> torch.Tensor:
    """Return token ids [batch_size, prompt_tokens] of all ranks' rows.

    Raises:
        ConfigError: a text prompt without a tokenizer, or with one of another model, or a file
            with too little text.
    """
    if batch.prompt == "synthetic":
        generator = torch.Generator().manual_seed(batch.seed)
        low = FIRST_ORDINARY_ID if vocab_size > 2 * FIRST_ORDINARY_ID else 0
        return torch.randint(
            low, vocab_size, (batch.batch_size, batch.prompt_tokens), generator=generator
        )
    if tokenizer is None:
        raise ConfigError(
            [
                f"batch.prompt={batch.prompt} needs a tokenizer, and none is here. "
                "Set batch.prompt=synthetic"
            ]
        )
    if batch.prompt == "text":
        ids = _repeated(tokenizer, batch.prompt_text, batch.prompt_tokens)
        rows = [ids] * batch.batch_size
    else:
        assert batch.prompt_file is not None, "config.py refuses prompt=file without one"
        rows = _windows(tokenizer, given_file(batch.prompt_file), batch)
    require_embedded(
        itertools.chain.from_iterable(rows), vocab_size, tokenizer, "batch.prompt=synthetic"
    )
    prompts = torch.tensor(rows)
    assert prompts.shape == (batch.batch_size, batch.prompt_tokens)
    return prompts


def _repeated(tokenizer: Any, text: str, count: int) -> list[int]:
    """Repeat the text, with a space between, and return its last `count` tokens."""
    once = len(tokenizer(" " + text, add_special_tokens=False)["input_ids"])
    ids: list[int] = tokenizer(
        " ".join([text] * (count // max(1, once) + 2)), add_special_tokens=False
    )["input_ids"]
    return ids[-count:]


def _windows(tokenizer: Any, path: Path, batch: BatchConfig) -> list[list[int]]:
    """Cut the file into rows of prompt_tokens tokens each."""
    ids: list[int] = tokenizer(path.read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    needed = batch.batch_size * batch.prompt_tokens
    if len(ids) < needed:
        raise ConfigError(
            [
                f"batch.prompt_file={path} has {len(ids)} tokens; {batch.batch_size} rows of "
                f"{batch.prompt_tokens} need {needed}. "
                f"Set batch.batch_size={max(1, len(ids) // batch.prompt_tokens)} or a smaller "
                "batch.prompt_tokens, or give a longer file"
            ]
        )
    return [
        ids[row * batch.prompt_tokens : (row + 1) * batch.prompt_tokens]
        for row in range(batch.batch_size)
    ]
