"""Load a model's own tokenizer, or that of the compatible model that the catalogue names."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.model.foreign import whole_sentence
from zinfer.model.hub import from_pretrained_kwargs

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from zinfer.config import ModelConfig


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
