"""Dummy weights behave like data; checkpoints are read only as far as they are trusted."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.composing import composed
from zinfer.config import ConfigError, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.model.weights.dummy import POOL_NUMEL, DummyFiller, dummy_model, stddev
from zinfer.model.weights.pretrained import open_checkpoint, pretrained_model, weights_source

OPT = {
    "model_type": "opt",
    "hidden_size": 32,
    "word_embed_proj_dim": 32,
    "ffn_dim": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "vocab_size": 64,
}


def filler(tmp_path: Path, model: str = "tiny-llama") -> DummyFiller:
    return DummyFiller(model_spec(composed(f"model={model}").model), EventLog(tmp_path))


def test_dummy_weights_are_normal_for_matrices_one_for_norms_zero_for_biases(
    tmp_path: Path,
) -> None:
    values = filler(tmp_path)
    matrix, norm, bias = torch.zeros(512, 512), torch.zeros(512), torch.ones(512)
    values.fill("weight", matrix)
    values.fill("weight", norm)
    values.fill("bias", bias)
    assert float(matrix.mean()) == pytest.approx(0.0, abs=1e-3)
    assert float(matrix.std()) == pytest.approx(stddev((512, 512)), rel=0.02)
    assert not (matrix == 0).any()
    assert (norm == 1).all()
    assert (bias == 0).all()


def test_values_depend_on_the_name_alone(tmp_path: Path) -> None:
    first, second, again = torch.zeros(64, 64), torch.zeros(64, 64), torch.zeros(64, 64)
    values = filler(tmp_path)
    values.fill("layers.0.weight", first)
    values.fill("layers.1.weight", second)
    values.fill("layers.0.weight", again)
    assert not torch.equal(first, second)
    assert torch.equal(first, again)


@pytest.mark.parametrize(
    ("inputs", "expected"), [(4, 1.0), (64, 0.25), (512, 2**-4), (4096, 2**-5), (12288, 2**-6)]
)
def test_the_spread_keeps_the_size_of_what_flows_through(inputs: int, expected: float) -> None:
    assert stddev((7, inputs)) == expected


def test_a_parameter_larger_than_the_pool_is_tiled_and_lending_equals_filling(
    tmp_path: Path,
) -> None:
    rows = POOL_NUMEL // 1024 + 100
    filled = torch.zeros(rows, 1024)
    lent = torch.nn.Parameter(torch.zeros(rows, 1024), requires_grad=False)
    filler(tmp_path).fill("weight", filled)
    filler(tmp_path).lend("weight", lent)
    assert torch.equal(filled, lent.data)
    assert not torch.equal(filled[0], filled[1])
    assert not (filled == 0).all(dim=1).any()


@pytest.mark.parametrize("part", [range(150), range(150, 300), range(299, 300), range(7, 7)])
def test_a_part_of_a_weight_has_the_values_of_the_whole(part: range, tmp_path: Path) -> None:
    shape = (300, 9001)  # more than two pools
    whole = torch.empty(shape)
    filler(tmp_path).fill("weight", whole)
    one = filler(tmp_path)
    one._scratch = torch.full((whole.numel(),), 7.0)
    lent = torch.empty(shape)
    one.lend("weight", lent, part)
    rows = slice(part.start, part.stop)
    assert torch.equal(lent[rows], whole[rows])
    others = torch.cat([lent[: part.start], lent[part.stop :]])
    assert (others == 7.0).all(), "nothing else is made"


def test_a_dummy_model_has_no_unfilled_parameter_and_keeps_its_ties(tmp_path: Path) -> None:
    config = composed("model=tiny-opt")
    model = dummy_model(
        config.model,
        model_spec(config.model),
        torch.float32,
        torch.device("cpu"),
        EventLog(tmp_path),
    )
    for name, parameter in model.named_parameters():
        if parameter.dim() > 1:
            spread = stddev(tuple(parameter.shape))
            assert float(parameter.detach().std()) == pytest.approx(spread, rel=0.2), name
    assert model.lm_head.weight is model.get_input_embeddings().weight


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path / "checkpoint"
    settings = {name: value for name, value in OPT.items() if name != "model_type"}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("opt", **settings)).save_pretrained(
        folder
    )
    return folder


def custom(folder: Path, **more: bool) -> ModelConfig:
    return composed(
        "model=custom",
        f"model.source={folder}",
        *(f"model.{name}={str(value).lower()}" for name, value in more.items()),
    ).model


def test_a_pickle_checkpoint_is_read_only_when_asked(checkpoint: Path, tmp_path: Path) -> None:
    from safetensors.torch import load_file

    torch.save(load_file(checkpoint / "model.safetensors"), checkpoint / "pytorch_model.bin")
    (checkpoint / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"no safetensors weights.*model\.allow_pickle=true"):
        open_checkpoint(custom(checkpoint), torch.float32, EventLog(tmp_path))
    opened = open_checkpoint(
        custom(checkpoint, allow_pickle=True), torch.float32, EventLog(tmp_path)
    )
    read = pretrained_model(opened, torch.float32, EventLog(tmp_path))
    assert read.model.config.hidden_size == 32


def test_a_checkpoint_that_is_not_what_is_pinned_is_said(checkpoint: Path, tmp_path: Path) -> None:
    from dataclasses import replace

    pinned = replace(composed("model=tiny-opt").model, source=str(checkpoint))
    open_checkpoint(pinned, torch.float32, EventLog(tmp_path))
    events = [json.loads(line) for line in (tmp_path / "events.jsonl").read_text().splitlines()]
    assert any(
        "hidden_size is 64" in event["message"] for event in events if event["event"] == "warning"
    )


def test_weights_that_cannot_be_reached_are_a_sentence(tmp_path: Path) -> None:
    model = composed("model=llama-2-7b", "weights=pretrained").model
    assert weights_source(model) == "meta-llama/Llama-2-7b-hf"
    with pytest.raises(ConfigError, match="weights=dummy"):
        open_checkpoint(model, torch.float32, EventLog(tmp_path))
