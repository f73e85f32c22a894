"""Load a model's own tokenizer, or that of the compatible model that the catalogue names."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError
from zinfer.model.foreign import whole_sentence
from zinfer.model.hub import from_pretrained_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zinfer.config import ModelConfig


def require_embedded(ids: Iterable[int], vocab_size: int, tokenizer: Any, instead: str) -> None:
    """Refuse a text whose tokens the model has no embedding for: another model's tokenizer.

    Generating from them reads beyond the table: an IndexError, or on a GPU the end of the process.

    Args:
        ids: tokens of the text.
        vocab_size: rows of the model's embedding.
        instead: what to set, `batch.prompt=synthetic`.

    Raises:
        ConfigError: with the largest token, how many are beyond, and the size of the embedding.
    """
    tokens = list(ids)
    beyond = [token for token in tokens if token >= vocab_size]
    if not beyond:
        return
    source = getattr(tokenizer, "name_or_path", None) or "the tokenizer"
    raise ConfigError(
        [
            f"{source} is no tokenizer of this model: {len(beyond):,} of the {len(tokens):,} "
            f"tokens of the text are beyond the {vocab_size:,} that it embeds, the largest is "
            f"{max(beyond):,}. Set model.tokenizer_id to the model's own, or {instead}"
        ]
    )


def find_tokenizer(
    model: ModelConfig, folder: str | Path | None = None
) -> tuple[PreTrainedTokenizerBase | None, str | None]:
    """Return the tokenizer, or None and the reason why there is none.

    The padding token is the end-of-sequence token, and rows are padded on the left, so that new
    tokens follow the prompt's last one. It is looked for in `folder`, else under
    `model.tokenizer_id` on the hub or in its local cache, else in `model.source`.
    """
    source = str(folder) if folder else model.tokenizer_id or model.source
    if source is None:
        return None, f"model={model.name} names no tokenizer"
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(
            os.path.expanduser(source),
            padding_side="left",
            **from_pretrained_kwargs(source, model),
        )
    except Exception as error:  # any file of any tokenizer class may fail in its own way
        return None, f"no tokenizer could be read from {source}: {whole_sentence(error)}"
    if tokenizer.eos_token is not None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer, None
