"""Whole runs whose linear layers multiply by our kernel: on every tier, and scored."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch import nn

from tests.helpers.running import results
from tests.helpers.scoring import NEW, read
from tests.helpers.tiny_models import tiny_model
from zinfer.config import QualityConfig
from zinfer.worker.quality import ROWS, compared
from zinfer.worker.quantised import native
from zinfer.worker.skinny import modules
from zinfer.worker.skinny.modules import own_products_up_to, use_own_products

WIDE = (  # matrices of more than 1 MiB, which is what DeepSpeed swaps
    "model=tiny-llama", "model.overrides.hidden_size=512", "model.overrides.intermediate_size=2048",
)  # fmt: skip
BATCH = ("batch.batch_size=2", "batch.prompt_tokens=9", "batch.new_tokens=8", "batch.warmup=1")
COMMON = (
    *WIDE, *BATCH, "batch.repeats=2", "dtype=bfloat16", "tracking=none", "launcher.omp_threads=1",
)  # fmt: skip


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if isinstance(reason := native.library(), str):
        pytest.skip(f"needs the compiled kernel: {reason}")


@pytest.mark.slow
def test_tokens_are_the_same_on_every_tier_and_the_result_says_what_multiplied(
    built_ops: list[str], tmp_path: Path
) -> None:
    forced = results(tmp_path / "forced", "offload=none,nvme", "dtype.kernel=compiled", *COMMON)
    (auto,) = results(tmp_path / "auto", "launcher.ranks=2", "offload=nvme", *COMMON)
    for job in (*forced, auto):
        assert job["status"] == "ok", job
    assert forced[0]["generated"]["token_ids"] == forced[1]["generated"]["token_ids"]
    for job in forced:
        assert job["linear"] == {
            "kernel": "compiled", "why": "dtype.kernel=compiled", "rows": 2, "trials": [],
        }  # fmt: skip
    measured = auto["linear"]
    assert measured["rows"] == 1
    assert {(row["out"], row["inputs"]) for row in measured["trials"]} >= {(512, 2048), (2048, 512)}
    assert all(row["own_s"] > 0 and row["torch_s"] > 0 for row in measured["trials"])
    assert json.loads((tmp_path / "auto" / "0" / "result.json").read_text())["linear"] == measured


@pytest.mark.parametrize("family", ["llama", "opt"])
def test_the_guard_finds_our_products_within_the_tolerance_of_16_bits(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    products = Mock(wraps=modules.own_linear)
    monkeypatch.setattr(modules, "own_linear", products)
    model = tiny_model(family).bfloat16()
    linear = [each for each in model.modules() if isinstance(each, nn.Linear)]
    layers = use_own_products(model, {tuple(each.weight.shape) for each in linear}, rows=1)  # type: ignore[misc]
    assert layers == len(linear)
    with own_products_up_to(0, model):
        reference = read(tmp_path, model)
    assert products.call_count == 0
    with own_products_up_to(ROWS, model):
        mine = read(tmp_path, model, reference=reference)
    # The head sees the last token of the prefill too: eight rows.
    assert products.call_count == layers * (NEW - 1) + 1
    quality = compared(reference, mine, QualityConfig())
    assert quality.verdict == "ok"
    assert quality.token_agreement >= 0.95
    assert quality.kl_divergence < 0.01
