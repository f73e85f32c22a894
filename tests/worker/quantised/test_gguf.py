"""GGUF files are packed tensor by tensor, with the values that transformers reads from them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

from tests.helpers.composing import composed
from zinfer.config import ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint, verify
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


def test_each_tensor_is_what_transformers_reads(tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM

    write_llama(tmp_path / "tiny.gguf")
    model = ModelConfig(name="custom", source=str(tmp_path), gguf_file="tiny.gguf")
    events = EventLog(tmp_path, 0, "attempt")
    opened = open_checkpoint(model, torch.float32, events)
    config = composed("dtype=int8", "dtype.group_size=32").dtype
    read = packed_model(opened, config, torch.float32, lambda _: None, events)
    assert verify(opened, read, events).tensors == 2 + 1 + 9 * LAYERS
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
