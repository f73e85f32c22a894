"""Every family's weights are rounded layer by layer, for the inputs that a text gives them."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.packed_models import loss_of, plainly_packed, rounded, weights_of
from tests.helpers.tiny_models import VOCAB, tiny_model
from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.quantisable import inputs_of, packed_bytes, stored_bits
from zinfer.model.spec import model_spec
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.pretrained import Opened, open_checkpoint
from zinfer.worker.quantised import searched as searched_module
from zinfer.worker.quantised.calibrated import pack_model
from zinfer.worker.quantised.searched import SearchedWeights, searched_weights

FAMILIES = ("llama", "opt", "bloom", "mixtral", "qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2")
GROUP = 32
DTYPE = replace(composed("dtype=int4").dtype, group_size=GROUP, eight_bits=())


def text(rows: int = 4, tokens: int = 48, seed: int = 0) -> torch.Tensor:
    chance = torch.Generator().manual_seed(seed)
    return torch.randint(2, VOCAB, (rows, tokens), generator=chance)


def opened_checkpoint(family: str, folder: Path) -> Opened:
    """Write a tiny checkpoint of a family, as published ones are, and open it."""
    tiny_model(family).save_pretrained(folder, max_shard_size="100KB")
    return opened_in(folder)


def opened_in(folder: Path) -> Opened:
    config = composed("model=custom", f"model.source={folder}").model
    return open_checkpoint(config, torch.float32, EventLog(folder))


def searched(family: str, folder: Path) -> dict[str, torch.Tensor]:
    packed: dict[str, torch.Tensor] = {}
    opened, weights = opened_checkpoint(family, folder), weights_of(tiny_model(family))
    pack_model(opened, DTYPE, weights, text(), packed.__setitem__, EventLog(folder))
    return packed


@pytest.mark.parametrize("family", FAMILIES)
def test_a_searched_model_of_any_family_is_nearer_to_the_exact_one(
    family: str, tmp_path: Path
) -> None:
    packed = searched(family, tmp_path)
    exact = tiny_model(family)
    wanted = {
        each.name: packed_bytes(each.numel, inputs_of(each), bits, GROUP)
        for each in weights_of(exact)
        if (bits := stored_bits(each, DTYPE)) is not None
    }
    assert {name: raw.numel() for name, raw in packed.items()} == wanted
    assert len(wanted) > 6
    plain = rounded(tiny_model(family), plainly_packed(exact, DTYPE), DTYPE)
    mine = rounded(tiny_model(family), packed, DTYPE)
    assert loss_of(mine, text(), exact) < 0.8 * loss_of(plain, text(), exact)


BAD = [  # a weight, its value, what is said
    ("model.layers.1.mlp.up_proj.weight", float("nan"), "holds NaN or infinity"),
    ("model.layers.1.input_layernorm.weight", float("inf"), "holds NaN or infinity"),
    ("model.embed_tokens.weight", float("nan"), "holds NaN or infinity"),
    ("model.layers.1.mlp.up_proj.weight", 1e7, r"cannot be held in 4 bits: row 0, column 0 holds"),
    ("lm_head.weight", -1e7, r"cannot be held in 4 bits: row 0, column 0 holds -1e\+07.*keep="),
]


@pytest.mark.parametrize(("name", "value", "said"), BAD)
def test_weights_that_cannot_be_rounded_are_named(
    name: str, value: float, said: str, tmp_path: Path
) -> None:
    model = tiny_model("llama")
    with torch.no_grad():
        model.get_parameter(name).view(-1)[0] = value
    model.save_pretrained(tmp_path)
    packed: dict[str, torch.Tensor] = {}
    with pytest.raises(WrongWeights, match=rf"tensor {name} {said}"):
        pack_model(
            opened_in(tmp_path), DTYPE, weights_of(tiny_model("llama")), text(),
            packed.__setitem__, EventLog(tmp_path),
        )  # fmt: skip


def config_of(folder: Path, *overrides: str) -> Any:
    return composed(
        "model=custom", f"model.source={folder}", "weights=pretrained", "dtype=int4", *overrides
    )


def test_weights_are_searched_once_and_made_again_where_they_are_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    opened = opened_checkpoint("llama", tmp_path / "llama")
    config = config_of(tmp_path / "llama", "dtype.group_size=32", "dtype.eight_bits=[]")
    spec = model_spec(config.model)
    events = EventLog(tmp_path)
    first = SearchedWeights(opened, config.dtype, spec, text(), events)
    monkeypatch.setattr(searched_module, "pack_model", never)
    second = SearchedWeights(opened, config.dtype, spec, text(), events)
    name = "model.layers.1.mlp.up_proj.weight"
    assert name in second and "model.norm.weight" not in second
    bytes_of_first = first.read(name)
    assert torch.equal(second.read(name), bytes_of_first)
    monkeypatch.undo()
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    file = next((tmp_path / "cache" / "quantised").glob("*/packed.safetensors"))
    whole = bytearray(file.read_bytes())
    whole[whole.index(bytes(bytes_of_first.tolist()))] ^= 1
    file.write_bytes(whole)
    assert torch.equal(second.read(name), bytes_of_first)
    assert f"{name} is not what was written" in (tmp_path / "events.jsonl").read_text()


def test_weights_that_were_changed_are_searched_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Change one value, which samples of the weights do not see; the file's time says it."""
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    opened = opened_checkpoint("llama", tmp_path / "llama")
    config = config_of(tmp_path / "llama", "dtype.group_size=32", "dtype.eight_bits=[]")
    spec, events = model_spec(config.model), EventLog(tmp_path)
    name = "model.layers.1.mlp.up_proj.weight"
    before = SearchedWeights(opened, config.dtype, spec, text(), events).read(name)
    assert opened.checkpoint is not None
    stored = opened.checkpoint.tensors[name]
    with (tmp_path / "llama" / stored.file).open("r+b") as file:
        file.seek((stored.begin or 0) + 4 * 2000)
        file.write(b"\0\0\0\x40")
    again = opened_in(tmp_path / "llama")
    assert not torch.equal(
        SearchedWeights(again, config.dtype, spec, text(), events).read(name), before
    )


def never(*_: object) -> None:
    raise AssertionError("the weights are searched a second time")


def test_a_layer_that_memory_does_not_hold_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(searched_module, "host_available_bytes", lambda: 1000)
    opened = opened_checkpoint("llama", tmp_path / "llama")
    config = config_of(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"1000 B are free\. Set dtype\.rounding=nearest"):
        SearchedWeights(opened, config.dtype, model_spec(config.model), text(), EventLog(tmp_path))


def test_without_a_tokenizer_nothing_is_searched(tmp_path: Path) -> None:
    opened = opened_checkpoint("llama", tmp_path / "llama")
    config = config_of(tmp_path / "llama")
    with pytest.raises(ConfigError, match=r"reads a text, and .*dtype\.rounding=nearest"):
        searched_weights(opened, config, model_spec(config.model), EventLog(tmp_path))
