"""Checkpoints of every family are packed as they are read, and generate what their values say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.helpers.composing import composed
from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.pretrained import Opened, open_checkpoint, verify
from zinfer.worker.quantised import loading
from zinfer.worker.quantised.loading import packed_model
from zinfer.worker.quantised.modules import SUFFIX, packed_modules
from zinfer.worker.quantised.packing import pack, unpack

NEW_TOKENS = 8
FAMILIES = [
    ("opt", "int8"), ("bloom", "int4"), ("llama", "int8"), ("mixtral", "int4"), ("gpt2", "int8"),
    ("qwen3_moe", "int8"), ("gpt_oss", "int4"), ("qwen3", "int4"), ("deepseek_v3", "int8"),
]  # fmt: skip


def events_in(folder: Path) -> EventLog:
    return EventLog(folder, 0, "attempt")


def opened_in(folder: Path, *overrides: str) -> Opened:
    model = composed("model=custom", f"model.source={folder}", *overrides).model
    return open_checkpoint(model, torch.float32, events_in(folder))


def saved(family: str, folder: Path, **changes: Any) -> Any:
    model = tiny_model(family, **changes)
    model.save_pretrained(folder, max_shard_size="100KB")
    return model


def load(folder: Path, *overrides: str) -> Any:
    """Load it packed, and check every weight as a run does."""
    dtype = composed("dtype=int8", "dtype.group_size=32", *overrides).dtype
    opened = opened_in(folder, *overrides)
    read = packed_model(opened, dtype, torch.float32, lambda _: None, events_in(folder))
    verify(opened, read, events_in(folder))
    return read.model


def with_rounded_values(plain: Any, packed: Any) -> Any:
    """Give the unmodified model the values that the packed one stands for."""
    done: set[int] = set()
    for name, _, packings in packed_modules(packed):
        for own, packing in packings.items():
            parameter = plain.get_submodule(name).get_parameter(own)
            if id(parameter) not in done:  # a tied one once
                done.add(id(parameter))
                bits = pack(parameter.data, packing, torch.float32)
                parameter.data = unpack(bits, packing, torch.float32)
    plain.config._experts_implementation = "eager"
    return plain


def tokens(model: Any) -> torch.Tensor:
    ids, mask = padded_prompts()
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        found: torch.Tensor = model.generate(ids, attention_mask=mask, **settings)
    return found


@pytest.mark.parametrize(("family", "dtype"), FAMILIES)
def test_tokens_are_those_of_an_unmodified_model_with_the_rounded_values(
    family: str, dtype: str, tmp_path: Path
) -> None:
    plain = saved(family, tmp_path)
    packed = load(tmp_path, f"dtype={dtype}", "dtype.kernel=unpack")
    expected = with_rounded_values(plain, packed)
    ids, mask = padded_prompts()
    with torch.no_grad():
        logits = [each(ids, attention_mask=mask).logits for each in (packed, expected)]
    assert torch.equal(*logits)
    assert torch.equal(tokens(packed), tokens(expected))


def test_kept_and_tied_weights(tmp_path: Path) -> None:
    saved("llama", tmp_path, tie_word_embeddings=True)
    model = load(tmp_path, "dtype.keep=[q_proj]")
    names = dict(model.named_parameters())
    assert "model.layers.0.self_attn.q_proj.weight" in names
    assert f"model.layers.0.self_attn.k_proj.weight{SUFFIX}" in names
    packed = model.lm_head.weight_packed
    assert packed is model.model.embed_tokens.weight_packed
    kept = load(tmp_path, "dtype.keep=[embeddings]")
    assert kept.lm_head.weight is kept.model.embed_tokens.weight


def rewrite(place: Path, change: Any) -> None:
    """Change the tensors of a file, or of a folder's first one."""
    path = sorted(place.glob("*.safetensors"))[0] if place.is_dir() else place
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def _with_nan(tensors: dict[str, torch.Tensor]) -> None:
    next(each for each in tensors.values() if each.dim() == 2)[1, 2] = float("nan")


def test_a_weight_that_is_no_number_is_named(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewrite(tmp_path, _with_nan)
    with pytest.raises(WrongWeights, match=r"tensor model\.embed_tokens\.weight holds NaN"):
        load(tmp_path)


def in_float64(tensors: dict[str, torch.Tensor]) -> None:
    tensors |= {name: each.double() for name, each in tensors.items()}


def with_a_number_beyond_float32(tensors: dict[str, torch.Tensor]) -> None:
    in_float64(tensors)
    _large(tensors, 1e300)


def with_a_number_beyond_float16(tensors: dict[str, torch.Tensor]) -> None:
    _large(tensors, 1e9)


def _large(tensors: dict[str, torch.Tensor], value: float) -> None:
    tensors["model.embed_tokens.weight"][1, 2] = value


def test_weights_of_float64_are_packed_as_those_of_float32(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    expected = tokens(load(tmp_path))
    for path in tmp_path.glob("*.safetensors"):
        rewrite(path, in_float64)
    assert torch.equal(tokens(load(tmp_path)), expected)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (with_a_number_beyond_float32, r"tensor model\.embed_tokens\.weight holds NaN or infinity"),
        (
            with_a_number_beyond_float16,
            r"cannot be held in 8 bits: row 1, column .*Set dtype\.keep=\[model\.embed_tokens\.",
        ),
    ],
)
def test_weights_that_codes_cannot_hold_are_named(change: Any, said: str, tmp_path: Path) -> None:
    saved("llama", tmp_path)
    rewrite(tmp_path, change)
    with pytest.raises(WrongWeights, match=said):
        load(tmp_path)


@pytest.mark.parametrize("zipped", [True, False], ids=["now", "before PyTorch 1.6"])
def test_pickles_are_packed_as_safetensors_are(zipped: bool, tmp_path: Path) -> None:
    model = saved("opt", tmp_path)
    expected = tokens(load(tmp_path))
    for path in tmp_path.glob("model*.safetensors*"):
        path.unlink()
    file = tmp_path / "pytorch_model.bin"
    torch.save(model.state_dict(), file, _use_new_zipfile_serialization=zipped)
    assert torch.equal(tokens(load(tmp_path, "model.allow_pickle=true")), expected)


def test_a_file_that_is_cut_while_it_is_read_is_named_with_its_tensor(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    opened = opened_in(tmp_path)
    last = sorted(tmp_path.glob("*.safetensors"))[-1]
    with last.open("r+b") as file:
        file.truncate(last.stat().st_size - 10)
    dtype = composed("dtype=int8").dtype
    with pytest.raises((WrongWeights, ConfigError), match=f"{last}.*tensor.*Download it again"):
        packed_model(opened, dtype, torch.float32, lambda _: None, events_in(tmp_path))


def test_a_read_that_ends_early_names_file_and_tensor(tmp_path: Path) -> None:
    saved("opt", tmp_path)
    slices = loading.stored_slices(opened_in(tmp_path).checkpoint)  # type: ignore[arg-type]
    name, one = list(slices.items())[-1]
    with one._path.open("r+b") as file:
        file.truncate(one._begin + 6)
    with pytest.raises(WrongWeights, match=rf"ends inside tensor {name}: \d+ of \d+ bytes"):
        one[...]


def test_what_is_stored_and_what_the_model_has_differ_in_shape(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    opened = opened_in(tmp_path)
    opened.hf_config.intermediate_size = 64
    dtype = composed("dtype=int8").dtype
    with pytest.raises(WrongWeights, match=r"is \[64, 96\], by config.json it is \[64, 64\]"):
        packed_model(opened, dtype, torch.float32, lambda _: None, events_in(tmp_path))


def test_weights_that_another_tool_quantised_are_refused(tmp_path: Path) -> None:
    saved("llama", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    config["quantization_config"] = {"quant_method": "gptq", "bits": 4}
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=r"quantised by another tool .gptq"):
        load(tmp_path)
