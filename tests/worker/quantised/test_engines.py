"""Packed weights give the same tokens on every tier and number of ranks."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.packed_families import NEW_TOKENS, overrides
from tests.helpers.packed_models import first_layers
from tests.helpers.running import results
from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.plan.deepspeed_json import deepspeed_json
from zinfer.plan.zero_layout import zero_layout
from zinfer.worker.engines.resident import load

FAMILIES = (
    "opt", "bloom", "llama", "mixtral", "qwen3_moe", "gpt_oss", "qwen3", "deepseek_v3", "gpt2",
)  # fmt: skip
SWAPPED: dict[str, dict[str, int]] = {
    "mixtral": {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 1},
    "gpt_oss": {"hidden_size": 128, "intermediate_size": 2048, "num_hidden_layers": 2},
    "deepseek_v3": {"hidden_size": 128, "moe_intermediate_size": 2048, "num_hidden_layers": 2},
}
"""Family -> changes that make its experts larger than 1 MiB, which is what DeepSpeed swaps."""
WIDE = (  # packed matrices of more than 1 MiB, which is what DeepSpeed swaps
    "model=tiny-llama", "model.overrides.hidden_size=512", "model.overrides.intermediate_size=5120",
)  # fmt: skip
BATCH = ("batch.batch_size=2", "batch.prompt_tokens=9", "batch.new_tokens=8", "batch.warmup=0")
COMMON = (*WIDE, *BATCH, "batch.repeats=1", "tracking=none", "launcher.omp_threads=1")


def said_by_one(folder: Path) -> list[list[int]]:
    """Return the tokens of a resident model with these weights in 8 bits."""
    config = composed(*overrides(folder, "none", 8), "engine=resident")
    spec = model_spec(config.model, compute_dtype="float32")
    model = load(config, spec, {}, EventLog(folder.parent, 0, "attempt")).model
    ids, mask = padded_prompts()
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        found: list[list[int]] = model.generate(ids, attention_mask=mask, **settings).tolist()
    return found


def said_by_two(root: Path, places: dict[str, str]) -> Any:
    """Return the tokens of two ranks under ZeRO-3: name of a checkpoint -> rows.

    Args:
        places: name -> where its weights are kept.
    """
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    asked = [f"{place}:{name}" for name, place in places.items()]
    done = subprocess.run(
        [*torchrun, "-m", "tests.helpers.packed_families", str(root), *asked],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=False, timeout=300, capture_output=True,
        text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads((root / "tokens.json").read_text())


@pytest.fixture
def one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this process be the only rank of a run."""
    for name, value in {"RANK": "0", "WORLD_SIZE": "1", "DS_ACCELERATOR": "cpu"}.items():
        monkeypatch.setenv(name, value)


@pytest.mark.slow
def test_two_ranks_say_what_a_resident_model_says_wherever_they_keep_weights(
    built_ops: list[str], one_rank: None, tmp_path: Path
) -> None:
    places = dict.fromkeys(FAMILIES, "cpu")
    for family in FAMILIES:
        tiny_model(family).save_pretrained(tmp_path / family, max_shard_size="100KB")
    for family, changes in SWAPPED.items():
        places[f"{family}_on_disk"] = "nvme"
        tiny_model(family, **changes).save_pretrained(tmp_path / f"{family}_on_disk")
    expected = {name: said_by_one(tmp_path / name) for name in places}
    assert said_by_two(tmp_path, places) == expected


@pytest.mark.slow
def test_the_demo_models_layers_say_the_same_on_disk_in_memory_and_resident(
    demo_model: Path, built_ops: list[str], one_rank: None, tmp_path: Path
) -> None:
    layers = first_layers(demo_model, tmp_path / "in_memory", 3)
    (tmp_path / "on_disk").symlink_to(layers)
    expected = said_by_one(layers)
    said = said_by_two(tmp_path, {"in_memory": "cpu", "on_disk": "nvme"})
    assert said == {"in_memory": expected, "on_disk": expected}


@pytest.mark.slow
def test_weights_on_disk_take_the_bytes_that_were_planned_and_say_the_same(
    built_ops: list[str], tmp_path: Path
) -> None:
    both = "dtype=int8,int4"
    jobs = results(tmp_path / "zero", "offload=nvme", "launcher.ranks=1,2", both, *COMMON)
    jobs += results(tmp_path / "resident", "engine=resident", both, *COMMON)
    assert [job["status"] for job in jobs] == ["ok"] * 6, [job["problems"] for job in jobs]
    for place, dtype in enumerate(both.removeprefix("dtype=").split(",")):
        config = composed(*COMMON, f"dtype={dtype}", "offload=nvme")
        mine = jobs[place::2]
        assert len({json.dumps(job["generated"]["token_ids"]) for job in mine}) == 1
        layout = zero_layout(config, model_spec(config.model, compute_dtype="bfloat16"))
        assert layout.swapped_count > 0
        stored = layout.stored_numel * layout.itemsize_bytes
        for job in mine:
            assert (
                stored <= job["metrics"]["weight_stored_bytes"] <= stored + 4096
            )  # padded partitions


def test_gathers_that_add_up_are_refused(tmp_path: Path) -> None:
    from zinfer.worker.engines.zero import build_packed

    config = composed("model=tiny-llama", "dtype=int8", "offload=cpu")
    spec = model_spec(config.model)
    asked = deepspeed_json(config, spec)
    asked["zero_optimization"]["stage3_use_all_reduce_for_fetch_params"] = True
    with pytest.raises(ConfigError, match=r"packed weights are no numbers\. Set it to false"):
        build_packed(config, spec, asked, None, EventLog(tmp_path, 0, "attempt"))
