"""Test what only a CUDA device can show. Skipped, with the reason, where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.helpers.gpu_runs import BATCH, MODEL, zinfer


@pytest.fixture(scope="module")
def runs(
    tmp_path_factory: pytest.TempPathFactory, built_ops: list[str]
) -> dict[str, dict[str, Any]]:
    """Run the same dummy model resident and under every offload target, in float32."""
    folder = tmp_path_factory.mktemp("gpu")
    targets = {
        "resident": ("engine=resident",),
        "none": ("offload=none",),
        "cpu": ("offload=cpu",),
        "pinned": ("offload=cpu", "offload.pin_memory=true"),
        "nvme": ("offload=nvme",),
    }
    return {
        name: zinfer(folder, *MODEL, *BATCH, "dtype=float32", *overrides)
        for name, overrides in targets.items()
    }


@pytest.mark.parametrize("target", ["none", "cpu", "pinned", "nvme"])
def test_tokens_equal_the_resident_models(target: str, runs: dict[str, dict[str, Any]]) -> None:
    assert runs[target]["generated"]["token_ids"] == runs["resident"]["generated"]["token_ids"]


def test_offloading_frees_device_memory(runs: dict[str, dict[str, Any]]) -> None:
    peaks = {name: run["metrics"]["peak_device_allocated_bytes"] for name, run in runs.items()}
    weights = runs["resident"]["model"]["weight_bytes"]
    assert peaks["resident"] >= weights
    assert peaks["cpu"] < peaks["none"]
    assert peaks["nvme"] < peaks["none"]


def test_the_plan_covers_the_device_peak(runs: dict[str, dict[str, Any]]) -> None:
    for name, run in runs.items():
        planned = run["plan"]["tiers"]["device"]["per_rank_bytes"]
        assert run["metrics"]["peak_device_allocated_bytes"] <= 1.3 * planned, name


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_sixteen_bits_run(dtype: str, tmp_path: Path, built_ops: list[str]) -> None:
    assert (
        zinfer(tmp_path, *MODEL, *BATCH, f"dtype={dtype}", "offload=cpu")["model"]["dtype"] == dtype
    )


@pytest.mark.parametrize("bits", [4, 8])
def test_quantised_weights_run(bits: int, tmp_path: Path, built_ops: list[str]) -> None:
    result = zinfer(tmp_path, *MODEL, *BATCH, f"dtype=int{bits}", "offload=cpu")
    assert result["metrics"]["weight_stored_bytes"] < 0.7 * result["model"]["weight_bytes"]


def test_the_environment_names_the_gpu(runs: dict[str, dict[str, Any]]) -> None:
    environment = Path(runs["cpu"]["job_dir"]) / "events.jsonl"
    assert environment.is_file()
    assert runs["cpu"]["plan"]["tiers"]["device"]["available_bytes"] > 0
