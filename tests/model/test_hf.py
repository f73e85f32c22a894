"""load_model_config and load_tokenizer: a model configured before any of its weights is read."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from zinfer.config import ModelConfig
from zinfer.model import hub
from zinfer.model.hf import load_model_config, load_tokenizer

LLAMA = {"model_type": "llama", "hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 32}


@pytest.fixture
def tokenizer_folder(tmp_path: Path) -> Path:
    """Make a folder with LLaMA's config.json and a tokenizer of three words without padding."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import Whitespace
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "Paris": 2}, unk_token="<unk>"))
    raw.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(
        tokenizer_object=raw, unk_token="<unk>", eos_token="</s>"
    ).save_pretrained(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(LLAMA))
    return tmp_path


def test_opt_175b_is_configured_from_opt_66b_without_a_network() -> None:
    config = load_model_config("opt-175b")
    assert config.architectures == ["OPTForCausalLM"]
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (
        12288,
        96,
        96,
    )
    assert str(config.dtype).removeprefix("torch.") == "float16"


@pytest.mark.parametrize(
    ("name", "architecture", "dtype"),
    [
        ("bloom-176b", "BloomForCausalLM", "bfloat16"),
        ("llama-2-70b", "LlamaForCausalLM", "float16"),
        ("mixtral-8x7b", "MixtralForCausalLM", "bfloat16"),
    ],
)
def test_model_type_decides_the_class(name: str, architecture: str, dtype: str) -> None:
    config = load_model_config(name)
    assert config.architectures == [architecture]
    assert str(config.dtype).removeprefix("torch.") == dtype


def test_a_folder_is_configured_and_overridden(tokenizer_folder: Path) -> None:
    config = load_model_config(str(tokenizer_folder))
    assert (config.model_type, config.hidden_size) == ("llama", 64)
    assert str(config.dtype).removeprefix("torch.") == "float16"  # the file names none
    shallow = ModelConfig(
        name="custom", source=str(tokenizer_folder), overrides={"num_hidden_layers": 1}
    )
    assert load_model_config(shallow).num_hidden_layers == 1


def test_rows_are_padded_on_the_left_with_the_end_of_sequence(tokenizer_folder: Path) -> None:
    tokenizer = load_tokenizer(str(tokenizer_folder))
    rows = tokenizer(["Paris", "Paris Paris"], padding=True)["input_ids"]
    assert rows == [[1, 2], [2, 2]]
    assert load_tokenizer("opt-175b", tokenizer_folder).pad_token == "</s>"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("opt-175", r"no model opt-175\. Did you mean opt-175b"),
        ("gpt5", r"no model gpt5\. .*Or give a folder or a hub id"),
        ("./absent/folder", r"there is no folder ./absent/folder"),
        ("nobody/published-this", r"the hub cannot be reached"),
    ],
)
def test_a_name_of_no_model_is_refused(
    name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    hub.hub_reachable.cache_clear()
    with pytest.raises(ValueError, match=message):
        load_model_config(name)


def test_without_a_tokenizer_the_reason_is_raised() -> None:
    with pytest.raises(ValueError, match=r"names no tokenizer\. Set model\.tokenizer_id"):
        load_tokenizer("tiny-llama")
