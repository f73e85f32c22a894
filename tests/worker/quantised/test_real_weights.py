"""Searched codes keep most of what a real model says, in the bytes of the nearest ones."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.packed_models import first_layers, loss_of, plainly_packed, rounded, weights_of
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint
from zinfer.worker.quality import cut
from zinfer.worker.quantised.calibrated import calibration_ids, pack_model

LAYERS = 3
"""Of the demo model's 30: a layer takes seconds."""
DTYPE = replace(composed("dtype=int4").dtype, keep=("embeddings",))


def plain_model(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.slow
def test_searched_codes_of_real_weights_lose_less_than_half_of_what_nearest_ones_lose(
    demo_model: Path, tmp_path: Path
) -> None:
    from transformers import AutoTokenizer

    folder = first_layers(demo_model, tmp_path / "first_layers", LAYERS)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config = composed("model=custom", f"model.source={folder}").model
    opened = open_checkpoint(config, torch.float32, EventLog(tmp_path))
    exact = plain_model(folder)
    packed: dict[str, torch.Tensor] = {}
    text = calibration_ids(tokenizer, None)
    pack_model(opened, DTYPE, weights_of(exact), text, packed.__setitem__, EventLog(tmp_path))
    scored = cut(tokenizer, 512).ids
    mine = loss_of(rounded(plain_model(folder), packed, DTYPE), scored, exact)
    nearest = rounded(plain_model(folder), plainly_packed(exact, DTYPE), DTYPE)
    assert mine < 0.5 * loss_of(nearest, scored, exact)
