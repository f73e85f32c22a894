"""Dummy weights are the same under every engine: tokens and logits agree, and prove something."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

ROOT = Path(__file__).parents[2]
SIZE = {
    "hidden_size": 64,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 128,
    "max_position_embeddings": 64,
}
FAMILIES: dict[str, dict[str, Any]] = {
    "minimax": {
        **SIZE,
        "head_dim": 16,
        "num_local_experts": 2,
        "num_experts_per_tok": 1,
        "layer_types": ["linear_attention", "full_attention"],
        "block_size": 4,
    },
    "mixtral": {**SIZE, "num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2": {**SIZE, "tie_word_embeddings": True},
    "opt": {**SIZE, "ffn_dim": 128, "word_embed_proj_dim": 64},
    "mamba": {"hidden_size": 64, "vocab_size": 512, "num_hidden_layers": 2, "state_size": 8},
    "gpt2": {"n_embd": 64, "n_layer": 2, "n_head": 4, "vocab_size": 512, "n_positions": 64},
}
ENGINES = {
    "resident": ("engine=resident",),
    "none": ("engine=zero", "offload=none"),
    "cpu": ("engine=zero", "offload=cpu"),
    "nvme": ("engine=zero", "offload=nvme"),
}


def asked(folder: Path) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    """Ask every family under every engine: (family, engine) -> what `loaded_answers` found."""
    wanted = {
        (family, engine): folder / f"{family}_{engine}" for family in FAMILIES for engine in ENGINES
    }
    lines = []
    for (family, engine), place in wanted.items():
        place.mkdir()
        settings = {"model_type": family, "dtype": "float32", **FAMILIES[family]}
        (place / "config.json").write_text(json.dumps(settings))
        swap = f"offload.nvme_path={place}/swap"
        lines.append(json.dumps([str(place), *ENGINES[engine], swap]))
    done = subprocess.run(
        [sys.executable, "-m", "tests.helpers.loaded_answers"],
        cwd=ROOT,
        input="\n".join(lines),
        capture_output=True,
        text=True,
        timeout=500,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {point: torch.load(place / "answer.pt") for point, place in wanted.items()}


@pytest.fixture(scope="module")
def found(
    built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], dict[str, torch.Tensor]]:
    return asked(tmp_path_factory.mktemp("engines"))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_engine_has_the_logits_and_tokens_of_the_resident_model(
    family: str, found: dict[tuple[str, str], dict[str, torch.Tensor]]
) -> None:
    answers = {engine: found[family, engine] for engine in ENGINES}
    resident = answers.pop("resident")
    for row in resident["tokens"].tolist():
        assert len(set(row)) >= 3, "a row that only repeats itself would prove nothing"
    assert float(resident["logits"].std()) > 0.1
    for name, other in answers.items():
        torch.testing.assert_close(other["logits"], resident["logits"], rtol=1e-4, atol=1e-4)
        assert torch.equal(other["tokens"], resident["tokens"]), name
    assert answers["none"]["is_partition"].all(), "each stays gathered, and has no second copy"
    assert not answers["cpu"]["is_partition"].all(), "layers are released after their use"
