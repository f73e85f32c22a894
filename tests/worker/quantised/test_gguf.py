"""GGUF files are packed tensor by tensor, with the values that transformers reads from them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.helpers.composing import composed
from zinfer.config import ConfigError, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.pretrained import Opened, Read, open_checkpoint, verify
from zinfer.worker.quantised.loading import packed_model
from zinfer.worker.quantised.modules import packed_modules
from zinfer.worker.quantised.packing import rounding_fault

HIDDEN, LAYERS, HEADS, KV_HEADS, WIDTH, VOCAB = 64, 2, 4, 2, 96, 128


def write_llama(path: Path) -> None:
    """Write a small LLaMA in GGUF, in 8 bits where the format packs."""
    from gguf import GGMLQuantizationType, GGUFWriter, quantize

    writer = GGUFWriter(path, "llama")
    writer.add_context_length(128)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(WIDTH)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(VOCAB)
    kv = HIDDEN * KV_HEADS // HEADS
    shapes = {"token_embd.weight": (VOCAB, HIDDEN), "output_norm.weight": (HIDDEN,)}
    shapes["output.weight"] = (VOCAB, HIDDEN)
    for layer in range(LAYERS):
        shapes |= {
            f"blk.{layer}.{name}.weight": shape
            for name, shape in {
                "attn_norm": (HIDDEN,), "ffn_norm": (HIDDEN,), "attn_q": (HIDDEN, HIDDEN),
                "attn_k": (kv, HIDDEN), "attn_v": (kv, HIDDEN), "attn_output": (HIDDEN, HIDDEN),
                "ffn_gate": (WIDTH, HIDDEN), "ffn_up": (WIDTH, HIDDEN), "ffn_down": (HIDDEN, WIDTH),
            }.items()
        }  # fmt: skip
    generator = np.random.default_rng(0)
    for name, shape in shapes.items():
        values = generator.standard_normal(shape).astype(np.float32)
        if len(shape) == 1:
            writer.add_tensor(name, values)
        else:
            kind = GGMLQuantizationType.Q8_0
            writer.add_tensor(name, quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def cut_data(raw: bytes) -> bytes:
    """Leave out the last tensor's end."""
    return raw[:-2000]


def cut_list(raw: bytes) -> bytes:
    """Cut inside the list of tensors."""
    return raw[: raw.index(b"blk.1.attn_q.weight") + 30]


def cut_settings(raw: bytes) -> bytes:
    """Cut inside the settings."""
    return raw[: raw.index(b"llama.block_count") + 8]


def unknown_type(raw: bytes) -> bytes:
    """Give a tensor a type of later days: its number follows its name and two sizes."""
    name = b"blk.0.ffn_up.weight"
    place = raw.index(name) + len(name) + 4 + 2 * 8
    return raw[:place] + (99).to_bytes(4, "little") + raw[place + 4 :]


def no_gguf(raw: bytes) -> bytes:
    """Return what a hub's page of an error is."""
    return b"<!DOCTYPE html>" + raw[:100]


def nothing(raw: bytes) -> bytes:
    """Return an empty file."""
    return b""


DAMAGED = [
    (
        cut_data,
        r"tiny\.gguf is cut short: tensor blk\.1\.ffn_down\.weight ends at byte \d+, the file",
    ),
    (cut_list, r"tiny\.gguf is cut short or damaged: its list of tensors"),
    (cut_settings, r"tiny\.gguf is cut short or damaged"),
    (unknown_type, r"tiny\.gguf: tensor blk\.0\.ffn_up\.weight has type 99.*pip install --upgrade"),
    (no_gguf, r"tiny\.gguf is not a GGUF file: it begins with b'<!DOCTYPE"),
    (nothing, r"tiny\.gguf is not a GGUF file"),
]


def opened_in(folder: Path) -> Opened:
    model = ModelConfig(name="custom", source=str(folder), gguf_file="tiny.gguf")
    return open_checkpoint(model, torch.float32, EventLog(folder, 0, "attempt"))


def packed_in(folder: Path, opened: Opened) -> Read:
    config = composed("dtype=int8", "dtype.group_size=32").dtype
    events = EventLog(folder, 0, "attempt")
    return packed_model(opened, config, torch.float32, lambda _: None, events)


@pytest.mark.parametrize(("damage", "said"), DAMAGED)
def test_a_damaged_file_is_named_with_its_tensor(damage: Any, said: str, tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    opened = opened_in(tmp_path)
    file.write_bytes(damage(file.read_bytes()))
    with pytest.raises(ConfigError, match=said):
        packed_in(tmp_path, opened)
    with pytest.raises(ConfigError, match=said):
        opened_in(tmp_path)


def test_a_file_that_is_not_there_is_said(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"there is no file .*tiny\.gguf"):
        opened_in(tmp_path)


def test_a_scale_that_is_no_number_names_its_tensor(tmp_path: Path) -> None:
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    opened = opened_in(tmp_path)
    raw = bytearray(file.read_bytes())
    raw[-34:-32] = np.float16("nan").tobytes()  # the last block: a scale, and 32 codes
    file.write_bytes(raw)
    with pytest.raises(WrongWeights, match=r"tensor model\.layers\.1\.\S+ holds NaN"):
        packed_in(tmp_path, opened)


def test_weights_of_a_file_have_a_fingerprint(tmp_path: Path) -> None:
    """A quantised run is compared with the scores of an unquantised one of the same weights."""
    file = tmp_path / "tiny.gguf"
    write_llama(file)
    first = opened_in(tmp_path).fingerprint()
    raw = bytearray(file.read_bytes())
    raw[-100] ^= 1
    file.write_bytes(raw)
    assert first != opened_in(tmp_path).fingerprint()


def test_each_tensor_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_llama(tmp_path / "tiny.gguf")
    opened = opened_in(tmp_path)
    read = packed_in(tmp_path, opened)
    assert verify(opened, read, EventLog(tmp_path, 0, "attempt")).tensors == 2 + 1 + 9 * LAYERS
    plain = AutoModelForCausalLM.from_pretrained(
        tmp_path, gguf_file="tiny.gguf", dtype=torch.float32
    )
    compared = 0
    for name, module, packings in packed_modules(read.model):
        for own, packing in packings.items():
            packed = module.get_parameter(own + "_packed")
            expected = plain.get_submodule(name).get_parameter(own).detach()
            assert rounding_fault(expected, packed, packing) is None, name
            compared += 1
    assert compared == 2 + 7 * LAYERS
