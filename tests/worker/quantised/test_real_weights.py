"""Searched codes keep most of what a real model says, in the bytes of the nearest ones."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.packed_models import loss_of, plainly_packed, rounded, weights_of
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint
from zinfer.worker.quality import cut
from zinfer.worker.quantised.calibrated import calibration_ids, pack_model

LAYERS = 3
"""Of the demo model's 30: a layer takes seconds."""
DTYPE = replace(composed("dtype=int4").dtype, keep=("embeddings",))


@pytest.fixture
def first_layers(demo_model: Path, tmp_path: Path) -> Path:
    """Write a checkpoint of the demo model's first layers."""
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "first_layers"
    folder.mkdir()
    for file in demo_model.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((demo_model / "config.json").read_text())
    settings["num_hidden_layers"] = LAYERS
    (folder / "config.json").write_text(json.dumps(settings))
    kept = {
        name: tensor
        for name, tensor in load_file(demo_model / "model.safetensors").items()
        if "layers." not in name or int(name.split("layers.")[1].split(".")[0]) < LAYERS
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
def test_searched_codes_of_real_weights_lose_less_than_half_of_what_nearest_ones_lose(
    first_layers: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(first_layers)
    config = composed("model=custom", f"model.source={first_layers}").model
    opened = open_checkpoint(config, torch.float32, EventLog(tmp_path))
    exact = plain_model(first_layers)
    packed: dict[str, torch.Tensor] = {}
    text = calibration_ids(tokenizer, None)
    pack_model(opened, DTYPE, weights_of(exact), text, packed.__setitem__, EventLog(tmp_path))
    scored = cut(tokenizer, 512).ids
    mine = loss_of(rounded(plain_model(first_layers), packed, DTYPE), scored, exact)
    nearest = rounded(plain_model(first_layers), plainly_packed(exact, DTYPE), DTYPE)
    assert mine < 0.5 * loss_of(nearest, scored, exact)
