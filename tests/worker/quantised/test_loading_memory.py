"""A checkpoint is never whole in memory: only what stays, and a tensor or two on their way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from tests.helpers.composing import composed
from zinfer.config import ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint
from zinfer.worker.quantised.loading import packed_model

MIB = 1 << 20
WORK = 48 * MIB
"""For float32 copies of a block, the model's modules and the allocator. A run may use 1 GB."""
SETTINGS = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a LLaMA of 108M parameters in bfloat16, one file for each layer."""
    from transformers import AutoModelForCausalLM, LlamaConfig

    folder = tmp_path_factory.mktemp("checkpoint")
    config = LlamaConfig(**SETTINGS)
    config.dtype = torch.bfloat16
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    placed: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    block = torch.randn(MIB).bfloat16() * 0.02
    for name, parameter in model.state_dict().items():
        part = name.split(".")[2] if ".layers." in name else "rest"
        placed[name] = f"model-{part}.safetensors"
        repeats = -(-parameter.numel() // MIB)
        values = block.repeat(repeats)[: parameter.numel()].view(parameter.shape)
        shards.setdefault(placed[name], {})[name] = values
    for file, tensors in shards.items():
        save_file(tensors, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def bytes_of(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


@pytest.mark.parametrize("stays", [True, False], ids=["in memory", "on disk"])
@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_loading_takes_what_stays_and_two_tensors(
    dtype: str, stays: bool, checkpoint: Path, tmp_path: Path
) -> None:
    events = EventLog(tmp_path, 0, "attempt")
    model = ModelConfig(name="custom", source=str(checkpoint))
    opened = open_checkpoint(model, torch.bfloat16, events)
    stored: list[int] = []

    def place(parameter: torch.nn.Parameter) -> None:
        stored.append(parameter.nbytes)
        if not stays:
            parameter.data = parameter.data[:0].clone()

    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    config = composed(f"dtype={dtype}").dtype
    read = packed_model(opened, config, torch.bfloat16, place, events)
    grown = bytes_of("VmHWM") - before
    largest = 2 * 4096 * 512
    assert grown <= (sum(stored) if stays else 0) + 2 * largest + WORK
    whole = sum(each.bytes for each in opened.checkpoint.tensors.values())  # type: ignore[union-attr]
    assert whole > 2 * largest + WORK + 100 * MIB, "else the bound would prove nothing"
    assert read.model is not None
