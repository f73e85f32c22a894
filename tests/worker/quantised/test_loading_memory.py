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
WORK = 64 * MIB
"""For float32 copies of a block, the model's modules and the allocator. A run may use 1 GB."""
LLAMA = {
    "hidden_size": 512,
    "intermediate_size": 2048,
    "num_hidden_layers": 24,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "vocab_size": 4096,
    "tie_word_embeddings": False,
}
MIXTRAL = {**LLAMA, "num_hidden_layers": 5, "num_local_experts": 12}


def write(folder: Path, family: str, settings: dict[str, object]) -> Path:
    """Write a checkpoint in bfloat16, one file for each layer, under the names of the hub."""
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.core_model_loading import revert_weight_conversion

    config = AutoConfig.for_model(family, **settings)
    config.dtype = torch.bfloat16
    config.save_pretrained(folder)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    placed: dict[str, str] = {}
    shards: dict[str, dict[str, torch.Tensor]] = {}
    block = torch.randn(MIB).bfloat16() * 0.02
    for name, parameter in revert_weight_conversion(model, model.state_dict()).items():
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


@pytest.fixture(scope="module")
def llama(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a LLaMA of 108M parameters."""
    return write(tmp_path_factory.mktemp("llama"), "llama", LLAMA)


@pytest.fixture(scope="module")
def mixtral(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a Mixtral of 200M parameters, whose experts are stored one by one."""
    return write(tmp_path_factory.mktemp("mixtral"), "mixtral", MIXTRAL)


@pytest.mark.parametrize(
    ("family", "dtype", "stays", "largest_numel"),
    [
        ("llama", "int8", False, 4096 * 512),
        ("llama", "int4", True, 4096 * 512),
        ("mixtral", "int4", False, 12 * 4096 * 512),
    ],
    ids=["on disk", "in memory", "experts on disk"],
)
def test_loading_takes_what_stays_and_two_tensors(
    family: str,
    dtype: str,
    stays: bool,
    largest_numel: int,
    request: pytest.FixtureRequest,
    tmp_path: Path,
) -> None:
    """Load in a process of its own, whose memory nothing else has used."""
    checkpoint = request.getfixturevalue(family)
    arguments = [str(checkpoint), dtype, str(stays), str(tmp_path)]
    said = subprocess.run(
        [sys.executable, "-m", "tests.helpers.loading_memory", *arguments],
        capture_output=True, text=True, check=True, cwd=Path(__file__).parents[3],
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},  # what is freed is given back
    )  # fmt: skip
    measured = json.loads(said.stdout.splitlines()[-1])
    largest = 2 * largest_numel
    most = (measured["stored_bytes"] if stays else 0) + 2 * largest + WORK
    assert measured["grown_bytes"] <= most
    whole = measured["checkpoint_bytes"]
    assert whole > 2 * largest + WORK + 100 * MIB, "else the bound would prove nothing"
