"""Score the demo model whole: what a placement, KV bits and packed weights cost its text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.running import results
from zinfer.config import QualityConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint, pretrained_model
from zinfer.worker.engines import Engine
from zinfer.worker.kv_cache.session import KvSession
from zinfer.worker.quality import ROWS, compared, cut, read_text
from zinfer.worker.quality_scores import Scores

SETTINGS = (
    "model=smollm2-135m", "weights=pretrained", "quality.enabled=true", "quality.tokens=512",
    "batch.batch_size=1", "batch.prompt_tokens=8", "batch.new_tokens=2",
    "batch.warmup=0", "batch.repeats=1", "tracking=none",
)  # fmt: skip
SAME = (1.0, (0.0, 1e-6), (0.9999, 1.0001))
"""What offload alone does in float32."""
IN_16_BITS = (0.94, (0.0, 0.006), (0.99, 1.01))
"""What our own products of bfloat16 weights do: docs/quantised.md states this tolerance."""
WAYS: dict[str, tuple[float, tuple[float, float], tuple[float, float]]] = {
    "device": (1.0, (0.0, 0.0), (1.0, 1.0)),
    "bfloat16": (1.0, (0.0, 0.0), (1.0, 1.0)),
    "host_attention": (1.0, (0.0, 1e-6), (0.9999, 1.0001)),
    "8 bits": (0.97, (1e-4, 0.005), (0.98, 1.02)),
    "4 bits": (0.6, (0.2, 0.8), (1.2, 2.0)),
    "keys 4 bits": (0.6, (0.2, 0.8), (1.15, 1.7)),
    "values 4 bits": (0.88, (0.015, 0.1), (0.97, 1.08)),
    "zero": SAME,
    "host memory": SAME,
    "disk": SAME,
    "bfloat16 host memory": SAME,
    "bfloat16 disk": SAME,
    "own products": IN_16_BITS,
    "own products, host memory": IN_16_BITS,
    "own products, disk": IN_16_BITS,
    "int8": (0.93, (0.001, 0.012), (0.98, 1.04)),
    "int4": (0.5, (0.6, 1.5), (1.6, 2.6)),
}
"""Way -> least agreement, range of the divergence in nats a token, and of the ratio.

Measured: 8 bits 0.996, 0.0016, 0.995; 4 bits 0.694, 0.425, 1.561; keys alone 0.694, 0.422, 1.373;
values alone 0.927, 0.045, 1.026. So keys suffer first, and almost all of it is theirs.
Weights: int8 0.964, 0.0042, 1.011; int4 0.601, 1.005, 2.068.
"""


ATTENTION = ("engine=resident", "dtype=float32", "kv_cache=host_attention")
SWEEPS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("device", "bfloat16"), ("engine=resident", "dtype=float32,bfloat16")),
    (("host_attention", "8 bits", "4 bits"), (*ATTENTION, "kv_cache.bits=16,8,4")),
    (("keys 4 bits",), (*ATTENTION, "kv_cache.key_bits=4")),
    (("values 4 bits",), (*ATTENTION, "kv_cache.value_bits=4")),
    (("zero", "host memory", "disk"), ("dtype=float32", "offload=none,cpu,nvme")),
    (
        ("bfloat16 host memory", "bfloat16 disk"),
        ("dtype=bfloat16", "dtype.kernel=torch", "offload=cpu,nvme"),
    ),
    (
        ("own products", "own products, host memory", "own products, disk"),
        ("dtype=bfloat16", "dtype.kernel=compiled", "offload=none,cpu,nvme"),
    ),
    (("int8", "int4"), ("engine=resident", "dtype.compute=float32", "dtype=int8,int4")),
)
"""The ways that one sweep scores, in the order of its jobs, and its settings.

The first leaves the references that the others are compared with.
"""


@pytest.fixture(scope="module")
def scored(
    demo_model: Path, built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, dict[str, Any]]:
    """Score the demo model under every way."""
    root = tmp_path_factory.mktemp("scored")
    made: dict[str, dict[str, Any]] = {}
    for number, (ways, settings) in enumerate(SWEEPS):
        jobs = results(root / str(number), *SETTINGS, *settings, timeout_s=900)
        made |= zip(ways, jobs, strict=True)
    for way, job in made.items():
        assert job["status"] == "ok", f"{way}: {job['reason']}"
    assert set(made) == set(WAYS)
    return made


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.parametrize("way", WAYS)
def test_the_demo_model_keeps_its_text(way: str, scored: dict[str, dict[str, Any]]) -> None:
    agreement, (least, most), (smallest, largest) = WAYS[way]
    metrics = scored[way]["metrics"]
    assert metrics["quality_token_agreement"] >= agreement
    assert least <= metrics["quality_kl_divergence"] <= most
    assert smallest <= metrics["quality_perplexity_ratio"] <= largest
    assert metrics["quality_scored_tokens"] == ROWS * 31


@pytest.mark.slow
@pytest.mark.timeout(3000)
def test_the_reference_is_made_once_and_bad_text_is_tagged(
    scored: dict[str, dict[str, Any]],
) -> None:
    first = ("device", "bfloat16")
    assert {scored[way]["quality"]["reference"] for way in first} <= {"this run", "kept"}
    assert {scored[way]["quality"]["reference"] for way in WAYS if way not in first} == {"kept"}
    beyond = scored["4 bits"]
    assert beyond["quality"]["verdict"] == "beyond_limits"
    assert any("quality.min_agreement is 0.9" in said for said in beyond["warnings"])
    assert scored["8 bits"]["quality"]["verdict"] == "ok"


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [1, 2])
def test_packed_weights_without_a_reference_are_refused_before_they_are_timed(
    ranks: int, demo_model: Path, built_ops: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "sweep"
    unscored = ("dtype=int8", "quality.tokens=88", f"launcher.ranks={ranks}", "batch.batch_size=2")
    (refused,) = results(folder, *SETTINGS, *unscored)
    assert refused["status"] == "refused" and not refused.get("metrics")
    (problem,) = refused["problems"]
    assert "Set dtype=bfloat16 once and leave the rest as it is" in problem
    assert '"verify"' in (events := (folder / "0" / "events.jsonl").read_text())
    assert '"generate"' not in events


def scores_in(
    dtype: torch.dtype, folder: Path, log: Path, reference: Scores | None = None
) -> Scores:
    """Let the unquantised model read the text in this type."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = cut(tokenizer, 512)
    config = composed("model=custom", f"model.source={folder}").changed(
        batch={
            "batch_size": ROWS,
            "prompt_tokens": text.prefilled,
            "new_tokens": text.new_tokens,
        }
    )
    events = EventLog(log, 0, "attempt")
    model = pretrained_model(open_checkpoint(config.model, dtype, events), dtype, events).model
    engine = Engine(
        model=model.eval(), tokenizer=tokenizer, device=torch.device("cpu"), rank=0, ranks=1,
        weight_stored_bytes=0,
    )  # fmt: skip
    return read_text(engine, text, config, KvSession(), events, reference)


@pytest.mark.slow
def test_16_bits_cost_next_to_nothing(demo_model: Path, tmp_path: Path) -> None:
    reference = scores_in(torch.float32, demo_model, tmp_path)
    mine = scores_in(torch.bfloat16, demo_model, tmp_path, reference)
    quality = compared(reference, mine, QualityConfig())
    assert quality.token_agreement >= 0.94  # measured: 0.980, 0.0033, 1.001
    assert 1e-4 <= quality.kl_divergence <= 0.01
    assert 0.98 <= quality.perplexity_ratio <= 1.02
