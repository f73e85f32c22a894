"""Runs with the KV cache in host memory: real engines, real offload targets, several ranks."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.command_lines import Ran, run_all
from tests.helpers.tiny_models import tiny_model

SETTINGS = (
    "weights=pretrained", "tracking=none", "dtype=float32", "launcher.omp_threads=1",
    "hardware.accelerator=cpu", "batch.batch_size=2", "batch.prompt_tokens=9",
    "batch.new_tokens=12", "batch.warmup=0", "batch.repeats=2",
)  # fmt: skip


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints whose matrices are large enough for DeepSpeed to swap them."""
    root = tmp_path_factory.mktemp("checkpoints")
    wide = {"hidden_size": 512, "intermediate_size": 1024, "num_attention_heads": 8}
    for family in ("llama", "bloom", "gpt_oss"):
        changes = {"hidden_size": 512, "n_head": 8} if family == "bloom" else wide
        changes = changes | ({"head_dim": 64} if family == "gpt_oss" else {})
        tiny_model(family, **changes).save_pretrained(root / family)
    return {path.name: path for path in root.iterdir()}


def jobs_of(folder: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run a sweep; the result of every job in the order of the jobs."""
    command = [sys.executable, "-m", "zinfer", "-m", f"hydra.sweep.dir={folder}", *overrides]
    done = subprocess.run(
        command, cwd=folder.parent, capture_output=True, text=True, timeout=550, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    results = sorted(folder.glob("*/result.json"), key=lambda path: int(path.parent.name))
    return [json.loads(path.read_text()) for path in results]


PLACEMENTS = "kv_cache=device,host,host_attention"


def swept(folder: Path, source: Path, *overrides: str) -> list[dict[str, Any]]:
    """Run one checkpoint with every placement."""
    return jobs_of(
        folder, "model=custom", f"model.source={source}", PLACEMENTS, *overrides, *SETTINGS
    )


FAMILIES = ("llama", "bloom", "gpt_oss")


@pytest.fixture(scope="module")
def everywhere(
    checkpoints: dict[str, Path], built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, list[dict[str, Any]]]:
    """Run each family under every engine, offload target and placement: twelve jobs each."""
    root = tmp_path_factory.mktemp("everywhere")
    sources = ",".join(str(checkpoints[family]) for family in FAMILIES)
    jobs: dict[str, list[dict[str, Any]]] = {family: [] for family in FAMILIES}
    for name, engine in (("zero", "offload=none,cpu,nvme"), ("resident", "engine=resident")):
        found = jobs_of(
            root / name, "model=custom", f"model.source={sources}", engine, PLACEMENTS, *SETTINGS
        )
        each = len(found) // len(FAMILIES)
        for number, family in enumerate(FAMILIES):
            jobs[family] += found[number * each : (number + 1) * each]
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_and_bytes_are_right_under_every_engine_and_offload(
    family: str, everywhere: dict[str, list[dict[str, Any]]]
) -> None:
    jobs = everywhere[family]
    assert len(jobs) == 12
    for job in jobs:
        assert job["generated"]["token_ids"] == jobs[0]["generated"]["token_ids"]
        assert job["metrics"]["prediction_ratio_kv_cache"] == 1.0, "planned is what is allocated"
    assert sum("kv_host_bytes" in job["metrics"] for job in jobs) == 8


@pytest.mark.slow
def test_two_ranks_share_the_rows_and_add_up_their_caches(
    checkpoints: dict[str, Path], built_ops: list[str], tmp_path: Path
) -> None:
    jobs = swept(tmp_path / "jobs", checkpoints["llama"], "offload=cpu", "launcher.ranks=2")
    one = swept(tmp_path / "one", checkpoints["llama"], "offload=cpu")
    for job, alone in zip(jobs, one, strict=True):
        assert job["generated"]["token_ids"] == alone["generated"]["token_ids"]
        assert job["metrics"]["kv_cache_bytes"] == alone["metrics"]["kv_cache_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("bits", ["kv_cache.bits=8", "kv_cache.bits=4", "kv_cache.value_bits=4"])
def test_quantised_caches_take_the_bytes_that_were_planned(
    bits: str, checkpoints: dict[str, Path], built_ops: list[str], tmp_path: Path
) -> None:
    folder, source = tmp_path / "jobs", checkpoints["llama"]
    placements = "kv_cache=host,host_attention"
    jobs = jobs_of(folder, "model=custom", f"model.source={source}", placements, bits, *SETTINGS)
    for job in jobs:
        assert job["status"] == "ok"
        assert job["metrics"]["prediction_ratio_kv_cache"] == 1.0
        tokens, heads, dim, layers, rows = 20, 2, 64, 3, 2
        a_head = {
            "kv_cache.bits=8": 2 * (dim + 4),
            "kv_cache.bits=4": 2 * (dim // 2 + 4),
            "kv_cache.value_bits=4": 4 * dim + dim // 2 + 4,
        }[bits]
        assert job["metrics"]["kv_host_bytes"] == tokens * heads * layers * rows * a_head


REFUSED = [
    (("kv_cache=host", "kv_cache.bits=3"), "kv_cache.bits=3"),
    (("kv_cache.bits=8",), "kv_cache.bits is set, but kv_cache=device"),
    (("kv_cache=host_attention", "kv_cache.device_layers=9"), "has 3 layers"),
    (("kv_cache=host", "kv_cache.bits=8", "kv_cache.group_size=48"), "head dimension"),
    (("kv_cache=host", "kv_cache.group_size=8"), "kv_cache.group_size=8 is too small"),
    (("kv_cache=elsewhere",), "elsewhere"),
]


@pytest.fixture(scope="module")
def answers(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Ran, Path]]:
    """Ask for each: what was said, and the folder in which it was asked."""
    folders = {says: tmp_path_factory.mktemp("refused") for _, says in REFUSED}
    commands = [
        (["model=tiny-llama", "tracking=none", *overrides], folders[says])
        for overrides, says in REFUSED
    ]
    return dict(zip(folders, zip(run_all(commands), folders.values(), strict=True), strict=True))


@pytest.mark.parametrize("says", [says for _, says in REFUSED])
def test_what_cannot_be_is_refused_before_anything_is_loaded(
    says: str, answers: dict[str, tuple[Ran, Path]]
) -> None:
    done, folder = answers[says]
    assert done.code == 2, done.stderr
    assert says in done.stdout + done.stderr
    assert "Traceback" not in done.stderr
    assert '"import"' not in "".join(path.read_text() for path in folder.rglob("events.jsonl"))
