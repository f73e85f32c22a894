"""A model holds the bytes that its plan said, and the values that a search has kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.packed_models import rounded
from tests.helpers.planning import planned
from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint, verify
from zinfer.worker.quantised import loading
from zinfer.worker.quantised.loading import packed_model
from zinfer.worker.quantised.searched import SearchedWeights

FAMILIES = (
    "opt", "bloom", "llama", "mixtral", "qwen3", "qwen3_moe", "gpt_oss", "deepseek_v3", "gpt2",
)  # fmt: skip


def bytes_of(model: Any) -> int:
    """Return the bytes of all parameters; tied ones once."""
    return sum(each.numel() * each.element_size() for each in model.parameters())


@pytest.mark.parametrize("weights", ["int8", "int4"])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_plan_counts_the_bytes_that_the_model_holds(
    family: str, weights: str, tmp_path: Path
) -> None:
    tiny_model(family).save_pretrained(tmp_path)
    run = planned(
        *("model=custom", f"model.source={tmp_path}", "weights=pretrained", "offload=none"),
        *(f"dtype={weights}", "dtype.compute=bfloat16", "dtype.group_size=32"),
        "hardware.accelerator=cpu",
    )
    opened = open_checkpoint(run.config.model, torch.bfloat16, EventLog(tmp_path))
    read = packed_model(
        opened, run.config.dtype, torch.bfloat16, lambda _: None, EventLog(tmp_path)
    )
    assert bytes_of(read.model) == run.plan.weight_stored_bytes
    assert any(item.name.startswith("weights in int") for item in run.plan.tier("device").items)


@pytest.mark.parametrize("family", ["llama", "mixtral", "gpt_oss"])
def test_searched_weights_are_loaded_as_they_were_kept(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    tiny_model(family).save_pretrained(tmp_path / family)
    run = planned(
        *("model=custom", f"model.source={tmp_path / family}", "weights=pretrained"),
        *("dtype=int4", "dtype.compute=float32", "dtype.group_size=32", "dtype.kernel=unpack"),
        "dtype.rounding=searched",
    )
    dtype, events = run.config.dtype, EventLog(tmp_path)
    opened = open_checkpoint(run.config.model, torch.float32, events)
    ids, mask = padded_prompts(rows=4, tokens=24)
    kept = SearchedWeights(opened, dtype, run.spec, ids, events)
    assert kept.seconds > 0
    wanted: list[bool] = []
    take = loading.StoredSlice.__getitem__

    def noted(stored: Any, index: Any) -> torch.Tensor:
        wanted.append(stored.is_wanted)
        return take(stored, index)

    monkeypatch.setattr(loading.StoredSlice, "__getitem__", noted)
    again = SearchedWeights(opened, dtype, run.spec, ids, events)
    assert again.seconds == 0 and not wanted
    read = packed_model(opened, dtype, torch.float32, lambda _: None, events, searched=again)
    verify(opened, read, events)
    packed = {each.name: kept.read(each.name) for each in run.spec.parameters if each.name in kept}
    assert wanted.count(False) >= len(packed), "their tensors are not read a second time"
    expected = rounded(tiny_model(family), packed, dtype)
    expected.config._experts_implementation = "eager"
    with torch.no_grad():
        logits = [each(ids, attention_mask=mask).logits for each in (read.model, expected)]
    torch.testing.assert_close(*logits, rtol=1e-4, atol=1e-4)
