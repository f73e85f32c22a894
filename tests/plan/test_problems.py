"""What cannot run is refused by the plan; real tiny models say what that is."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.composing import composed
from tests.helpers.planning import planned
from zinfer.config import ConfigError
from zinfer.machine.hardware import detect_hardware
from zinfer.model.spec import model_spec
from zinfer.plan.problems import has_position_table, spec_problems, tokenizer_size
from zinfer.plan.resolved import resolved_spec
from zinfer.plan.warnings import plan_warnings

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
GPT = {"n_embd": 16, "n_layer": 2, "n_head": 4, "n_positions": 16, "vocab_size": 64}
WIDE = {**SMALL, "intermediate_size": 32, "max_position_embeddings": 16}
POSITIONS = [  # families whose positions are rows of a table, learned or not, and others
    ("opt", {**SMALL, "ffn_dim": 32, "word_embed_proj_dim": 16, "max_position_embeddings": 16}),
    ("gpt2", GPT),
    ("gpt_bigcode", GPT),
    ("gptj", {**GPT, "rotary_dim": 4}),
    ("codegen", {**GPT, "rotary_dim": 4}),
    ("ctrl", {**GPT, "dff": 32}),
    ("mpt", {"d_model": 16, "n_layers": 2, "n_heads": 2, "max_seq_len": 16, "vocab_size": 64}),
    ("biogpt", WIDE),
    ("bloom", {**SMALL, "n_layer": 2, "n_head": 2}),
    ("llama", WIDE),
    ("gpt_neox", WIDE),
    ("phi", WIDE),
    ("mamba", {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}),
]


@pytest.mark.parametrize(("family", "settings"), POSITIONS, ids=[row[0] for row in POSITIONS])
def test_a_model_is_refused_beyond_its_positions_exactly_where_it_fails(
    tmp_path: Path, family: str, settings: dict[str, Any]
) -> None:
    """16 positions: 15 + 2 tokens run everywhere, 16 + 2 where positions are no table."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    hf_config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(hf_config).eval()
    hf_config.architectures = [type(model).__name__]
    hf_config.save_pretrained(tmp_path)
    for prompt in (15, 16):
        config = composed(
            "model=custom",
            f"model.source={tmp_path}",
            f"batch.prompt_tokens={prompt}",
            "batch.new_tokens=2",
        )
        spec = model_spec(config.model)
        try:
            with torch.no_grad():
                model.generate(
                    torch.randint(5, 60, (1, prompt)),
                    max_new_tokens=2,
                    min_new_tokens=2,
                    do_sample=False,
                    pad_token_id=0,
                )
            runs = True
        except (IndexError, RuntimeError):
            runs = False
        assert (spec_problems(spec, config) == []) is runs, prompt


@pytest.mark.parametrize(
    ("prompt", "new", "words"),
    [
        (2000, 100, "need 2099 positions, opt-125m has 2048. Set batch.prompt_tokens=1949"),
        (1000, 4000, "Set batch.new_tokens=1049"),
        (4000, 4000, "Set batch.prompt_tokens=1024 batch.new_tokens=1024"),
    ],
)
def test_too_many_positions_name_the_batch_that_fits(prompt: int, new: int, words: str) -> None:
    overrides = [f"batch.prompt_tokens={prompt}", f"batch.new_tokens={new}"]
    config = composed("model=opt-125m", "hardware=a6000", *overrides)
    hardware = detect_hardware(config.hardware, None)
    with pytest.raises(ConfigError, match="positions") as refused:
        resolved_spec(config, hardware, lambda message: None)
    assert words in str(refused.value)
    advised = words.rpartition("Set ")[2].split()
    mended = composed("model=opt-125m", "hardware=a6000", *overrides, *advised)
    assert spec_problems(resolved_spec(mended, hardware, lambda message: None), mended) == []


def test_rotary_positions_beyond_those_of_the_model_are_a_warning() -> None:
    run = planned("model=llama-2-7b", "hardware=a6000", "batch.prompt_tokens=8000")
    assert not has_position_table(run.spec)
    assert "beyond the 4096 that llama-2-7b is made for" in "\n".join(plan_warnings(run))


@pytest.mark.parametrize(
    ("field", "value", "words"),
    [
        ("num_layers", 0, "num_hidden_layers=0"),
        ("num_layers", -1, "num_hidden_layers=-1"),
        ("vocab_size", 0, "vocab_size=0"),
        ("hidden_size", 0, "hidden_size=0"),
        ("num_kv_heads", 5, "32 attention heads and 5 heads of keys and values"),
        ("num_kv_heads", 64, "32 attention heads and 64 heads of keys and values"),
        ("num_kv_heads", 0, "32 attention heads and 0 heads of keys and values"),
    ],
)
def test_a_model_that_is_none_is_refused(field: str, value: int, words: str) -> None:
    run = planned("model=llama-3-8b", "hardware=a6000")
    changes: dict[str, Any] = {field: value}
    problems = spec_problems(replace(run.spec, **changes), run.config)
    assert len(problems) == 1 and words in problems[0]


def test_a_model_without_attention_has_no_heads_to_divide() -> None:
    run = planned("model=llama-3-8b", "hardware=a6000")
    assert spec_problems(replace(run.spec, num_attention_heads=0, num_kv_heads=0), run.config) == []


@pytest.mark.parametrize(
    ("vocabulary", "size"),
    [({"a": 0, "b": 255}, 256), ([["a", -1.0], ["b", -2.0]], 2), ({}, 0), ("broken", None)],
)
def test_a_tokenizer_is_as_large_as_its_last_token(
    tmp_path: Path, vocabulary: Any, size: int | None
) -> None:
    path = tmp_path / "tokenizer.json"
    path.write_text("{" if vocabulary == "broken" else json.dumps({"model": {"vocab": vocabulary}}))
    assert tokenizer_size(path) == size


@pytest.mark.parametrize(("prompt", "is_refused"), [("text", True), ("synthetic", False)])
def test_a_tokenizer_larger_than_the_vocabulary_is_refused_where_it_is_used(
    tmp_path: Path, prompt: str, is_refused: bool
) -> None:
    settings = {"model_type": "llama", **WIDE}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    tokens = {f"t{number}": number for number in range(65)}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
    config = composed("model=custom", f"model.source={tmp_path}", f"batch.prompt={prompt}")
    problems = spec_problems(model_spec(config.model), config)
    assert any("has 65 tokens" in problem for problem in problems) is is_refused
