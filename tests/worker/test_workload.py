"""Prompts of another model's tokenizer are refused with the numbers, before anything generates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import PreTrainedTokenizerFast

from tests.helpers.composing import composed
from zinfer.config import ConfigError
from zinfer.model.tokenizer import require_embedded
from zinfer.worker.workload import prompt_ids

WORDS = {"<unk>": 0, "Paris": 1, "is": 2, "the": 3, "capital": 40, "city": 50, "of": 99}


def tokenizer(**added: int) -> PreTrainedTokenizerFast:
    """A tokenizer with these words, and more."""
    words = Tokenizer(WordLevel({**WORDS, **added}, unk_token="<unk>"))
    words.pre_tokenizer = Whitespace()
    made = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>", eos_token="<unk>")
    made.name_or_path = "someone/else"
    return made


def prompt(*overrides: str, made: Any, vocab_size: int) -> Any:
    batch = composed("batch.prompt=text", "batch.prompt_tokens=12", *overrides).batch
    return prompt_ids(batch, vocab_size, made)


def test_a_text_whose_tokens_are_all_embedded_is_taken() -> None:
    assert prompt(made=tokenizer(), vocab_size=100).max() == 99


@pytest.mark.parametrize(
    ("vocab_size", "beyond"), [(99, "2 of the 12"), (50, "4 of the 12"), (2, "10 of the 12")]
)
def test_a_text_beyond_the_embedding_is_refused_with_the_numbers(
    vocab_size: int, beyond: str
) -> None:
    with pytest.raises(ConfigError) as refused:
        prompt(made=tokenizer(), vocab_size=vocab_size)
    (problem,) = refused.value.problems
    assert f"{beyond} tokens of the text are beyond the {vocab_size} " in problem
    assert "someone/else" in problem and "the largest is 99" in problem
    assert "Set model.tokenizer_id" in problem and "batch.prompt=synthetic" in problem


def test_a_token_that_was_added_to_the_tokenizer_counts_too() -> None:
    """Added tokens are in no tokenizer.json's vocabulary, so no plan can see them."""
    made = tokenizer()
    made.add_tokens(["zinfer"])
    with pytest.raises(ConfigError, match="the largest is"):
        prompt("batch.prompt_text=Paris zinfer", made=made, vocab_size=len(WORDS))


def test_a_file_is_held_to_the_same(tmp_path: Path) -> None:
    text = tmp_path / "text"
    text.write_text("Paris is the capital " * 20)
    overrides = ("batch.prompt=file", f"batch.prompt_file={text}")
    assert prompt(*overrides, made=tokenizer(), vocab_size=41).max() == 40
    with pytest.raises(ConfigError, match="beyond the 40 that"):
        prompt(*overrides, made=tokenizer(), vocab_size=40)


def test_synthetic_prompts_ask_for_no_other_rows() -> None:
    batch = composed("batch.prompt=synthetic").batch
    assert prompt_ids(batch, 7, None).max() < 7


@pytest.mark.parametrize(("ids", "is_refused"), [([], False), ([0, 4], False), ([5], True)])
def test_the_first_id_beyond_is_the_size_of_the_table(ids: list[int], is_refused: bool) -> None:
    if not is_refused:
        assert require_embedded(ids, 5, None, "x=y") is None  # type: ignore[func-returns-value]
        return
    with pytest.raises(ConfigError, match="the largest is 5"):
        require_embedded(ids, 5, None, "x=y")
