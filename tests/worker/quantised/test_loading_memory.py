"""A checkpoint is never whole in memory: only what stays, and a tensor or two on their way."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

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


@pytest.mark.parametrize(
    ("dtype", "stays"), [("int8", False), ("int4", True)], ids=["on disk", "in memory"]
)
def test_loading_takes_what_stays_and_two_tensors(
    dtype: str, stays: bool, checkpoint: Path, tmp_path: Path
) -> None:
    """Load in a process of its own, whose memory nothing else has used."""
    arguments = [str(checkpoint), dtype, str(stays), str(tmp_path)]
    said = subprocess.run(
        [sys.executable, "-m", "tests.helpers.loading_memory", *arguments],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )  # fmt: skip
    measured = json.loads(said.stdout.splitlines()[-1])
    largest = 2 * 4096 * 512
    most = (measured["stored_bytes"] if stays else 0) + 2 * largest + WORK
    assert measured["grown_bytes"] <= most
    whole = measured["checkpoint_bytes"]
    assert whole > 2 * largest + WORK + 100 * MIB, "else the bound would prove nothing"
