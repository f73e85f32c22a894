"""The memory plan against arithmetic by hand, real tensors, and runs that a limit ends."""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.composing import composed
from tests.helpers.planning import planned
from zinfer.model.spec import model_spec
from zinfer.plan.fit import DoesNotFit, largest_fitting_batch, require_fit
from zinfer.plan.memory import memory_plan
from zinfer.plan.process_memory import GROWTH_BYTES, IMPORTED_RSS_BYTES, mapped_bytes
from zinfer.plan.tiers import MemoryPlan
from zinfer.plan.working_memory import prefill_bytes
from zinfer.units import GIB, MIB


def item(plan: MemoryPlan, tier: Any, name: str) -> int:
    return next((entry.bytes for entry in plan.tier(tier).items if entry.name == name), 0)


def test_buffers_that_hold_less_than_a_leaf_are_refused() -> None:
    plan = planned(
        "model=llama-2-7b",
        "offload=nvme",
        "dtype=bfloat16",
        "offload.buffer_count=6",
        "zero.leaf_layers=true",
    ).plan
    assert plan.problems == (
        "6 NVMe buffers are fewer than one layer's parameters need. Set offload.buffer_count=7",
    )


def test_opt_175b_on_nvme_by_hand() -> None:
    """174.6 G parameters in float16, KV of 32 rows of 543 cached tokens in 96 layers, buffers."""
    run = planned(
        "model=opt-175b",
        "offload=nvme",
        "dtype=float16",
        "hardware=a6000",
        "batch=paper",
        "batch.batch_size=32",
    )
    assert item(run.plan, "device", "kv cache") == 32 * 543 * 4_718_592
    buffers = run.deepspeed_json()["zero_optimization"]["offload_param"]
    staged = buffers["buffer_count"] * buffers["buffer_size"] * 2
    plan = run.plan
    assert plan.tier("pinned").per_rank_bytes == staged
    swapped = plan.tier("disk").per_rank_bytes
    assert 174_604_468_224 * 2 - swapped == pytest.approx(0, abs=64 * MIB)
    assert not plan.fits  # 82 GB of KV cache in 48 GB


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_buffers_of_gpu_direct_storage_are_on_the_device(dtype: str) -> None:
    """DeepSpeed makes them on the accelerator and locks no host memory for them."""
    common = (
        "model=opt-30b", "offload=nvme", f"dtype={dtype}", "hardware=a6000",
        "offload.buffer_count=6",
    )  # fmt: skip
    through_host = planned(*common).plan
    direct = planned(*common, "offload.use_gds=true").plan
    staged = item(through_host, "pinned", "NVMe staging buffers")
    assert staged > 0 and item(through_host, "device", "NVMe staging buffers") == 0
    assert item(direct, "device", "NVMe staging buffers") == staged
    assert direct.tier("pinned").per_rank_bytes == 0
    grown = direct.tier("device").per_rank_bytes - through_host.tier("device").per_rank_bytes
    assert grown == staged


def test_tuned_buffers_of_gpu_direct_storage_leave_the_device_room() -> None:
    """Their limit is a quarter of the device's memory, whatever the host has."""
    sizes = [
        item(
            planned(
                "model=opt-175b", "offload=nvme", "dtype=float16", "hardware=a6000",
                "offload.use_gds=true", host_available_bytes=host, host_total_bytes=host,
            ).plan,
            "device",
            "NVMe staging buffers",
        )
        for host in (64 * GIB, 4096 * GIB)
    ]  # fmt: skip
    assert sizes[0] == sizes[1] <= 12 * GIB


def test_the_published_buffers_of_bloom_take_90_gib() -> None:
    plan = planned(
        "model=bloom-176b", "offload=nvme", "dtype=float16", "zero=paper", "hardware=a6000"
    ).plan
    assert plan.tier("pinned").per_rank_bytes == 5 * 9 * GIB * 2


def test_attention_that_materialises_scores_is_counted_as_such() -> None:
    """BLOOM: rows x heads x prompt x prompt in float32, three times; LLaMA's fused one has none."""
    bloom = planned("model=bloom-560m", "dtype=bfloat16").spec
    assert prefill_bytes(bloom, 4, 2048)["attention scores"] == 3 * 4 * 16 * 2048 * 2048 * 4
    llama = planned("model=llama-3-8b", "dtype=bfloat16").spec
    assert prefill_bytes(llama, 4, 2048).get("attention scores", 0) == 0


def test_logits_are_of_the_last_position_only() -> None:
    """Prompt of one token: the 250,880 logits are largest, once bfloat16 and twice float32."""
    bloom = planned("model=bloom-560m", "dtype=bfloat16").spec
    assert prefill_bytes(bloom, 8, 1) == {"logits of the last position": 8 * 250_880 * (2 + 8)}
    assert "logits of the last position" not in prefill_bytes(bloom, 8, 512)


def test_on_the_cpu_the_device_is_host_memory() -> None:
    plan = planned(
        "model=opt-125m", "offload=none", "dtype=float32", "hardware.accelerator=cpu"
    ).plan
    assert plan.device_is_host
    assert plan.peak_device_bytes is None
    assert plan.tier("device").available_bytes is None
    assert (
        plan.tier("host").needed_bytes
        == plan.tier("host").per_rank_bytes + plan.tier("device").per_rank_bytes
    )
    rest = IMPORTED_RSS_BYTES + GROWTH_BYTES["none"]
    assert plan.peak_host_rss_bytes > rest + plan.weight_stored_bytes


def test_a_gpu_pays_for_gathered_layers_and_a_context() -> None:
    plan = planned("model=llama-3-8b", "offload=cpu", "dtype=bfloat16", "hardware=h100_2nvme").plan
    assert item(plan, "device", "gathered layers") >= 2 * 218_112_000 * 2
    assert plan.peak_device_bytes == plan.tier("device").needed_bytes - item(
        plan, "device", "CUDA context"
    )
    assert item(plan, "host", "weights") == pytest.approx(8_030_261_248 * 2, rel=0.001)


def test_a_mapped_checkpoint_counts_with_the_size_of_its_files(tmp_path: Path) -> None:
    """Two files of 3 and 5 MB; where none is there, the published type's two bytes an element."""
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2}
    config = {"model_type": "llama", **sizes, "num_attention_heads": 2, "vocab_size": 256}
    (tmp_path / "config.json").write_text(json.dumps(config))
    for name, size in (("model-1.safetensors", 3_000_000), ("model-2.safetensors", 5_000_000)):
        with (tmp_path / name).open("wb") as file:
            file.truncate(size)
    config = composed(
        "model=custom", f"model.source={tmp_path}", "weights=pretrained", "dtype=float32"
    )
    spec = model_spec(config.model, compute_dtype="float32")
    assert mapped_bytes(config, spec) == 8_000_000
    away = composed("model=opt-125m", "weights=pretrained", "dtype=float32")
    spec = model_spec(away.model, compute_dtype="float32")
    assert (
        away.model.checkpoint_dtype == "float16"
        and mapped_bytes(away, spec) == spec.num_parameters * 2
    )


@pytest.mark.parametrize(
    ("dtype", "hardware", "bytes_per_element"),
    [
        (
            ("dtype=int8",),
            "a6000",
            4,
        ),  # the unpacked matrix in bfloat16, and what it is multiplied from
        (("dtype=int4",), "a6000", 5),  # and a byte for each half-byte on the way
        (
            ("dtype=int4", "dtype.compute=float16"),
            "a6000",
            4,
        ),  # DeepSpeed's kernel goes straight to float16
    ],
)
def test_the_largest_quantised_matrix_is_unpacked_as_a_whole(
    dtype: tuple[str, ...], hardware: str, bytes_per_element: int
) -> None:
    plan = planned("model=opt-1.3b", *dtype, "zero=paper", f"hardware={hardware}").plan
    assert item(plan, "device", "dequantised weights") == bytes_per_element * 50_272 * 2048


def test_what_does_not_fit_says_what_to_type() -> None:
    run = planned("model=opt-30b", "offload=none", "dtype=float16", "hardware=a6000")
    with pytest.raises(DoesNotFit) as refused:
        require_fit(run)
    assert "device: needs" in str(refused.value)
    assert "offload=cpu" in str(refused.value)


def test_the_largest_batch_fits_and_one_more_does_not() -> None:
    run = planned(
        "model=llama-3-8b", "offload=none", "dtype=bfloat16", "hardware=h100_2nvme", "batch=paper"
    )
    largest = largest_fitting_batch(run)
    assert largest is not None

    def fits(rows: int) -> bool:
        return memory_plan(run.spec, run.config.with_batch(rows), run.hardware).fits

    assert fits(largest) and not fits(largest + 1)


def run(tmp_path: Path, *overrides: str, limit: Callable[[], None] | None = None) -> dict[str, Any]:
    """Return one run's result document."""
    shared = [
        "tracking=none",
        "format=json",
        "launcher.omp_threads=1",
        "hardware.accelerator=cpu",
        "batch.repeats=1",
        "batch.warmup=0",
    ]
    command = [sys.executable, "-m", "zinfer", *shared, *overrides]
    done = subprocess.run(
        command,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=200,
        preexec_fn=limit,
        env=os.environ,
    )
    assert done.stdout.strip(), done.stderr[-2000:]
    result: dict[str, Any] = json.loads(done.stdout)
    return result


MEASURED = [  # rotary positions and GQA; tied embeddings; swapped; experts; quantised weights
    ("model=tiny-llama", "offload=none", "dtype=float32"),
    ("model=opt-125m", "offload=cpu", "dtype=bfloat16"),
    ("model=smollm2-135m", "offload=nvme", "dtype=bfloat16"),
    ("model=tiny-mixtral", "engine=resident", "dtype=float32"),
    ("model=opt-125m", "offload=none", "dtype=int8"),
    ("model=smollm2-135m", "offload=none", "dtype=int4"),
]


@pytest.mark.slow
@pytest.mark.parametrize("overrides", MEASURED)
def test_weights_cache_and_peak_are_what_the_plan_said(
    tmp_path: Path, built_ops: list[str], overrides: tuple[str, ...]
) -> None:
    result = run(
        tmp_path, *overrides, "batch.batch_size=4", "batch.prompt_tokens=64", "batch.new_tokens=8"
    )
    metrics = result["metrics"]
    assert metrics["kv_cache_bytes"] == metrics["predicted_kv_cache_bytes"]
    if not {"offload=nvme", "dtype=int8", "dtype=int4"} & set(overrides):
        stored = metrics["weight_stored_bytes"]
        assert stored == pytest.approx(result["model"]["weight_bytes"], rel=0.01)
    assert metrics["prediction_ratio_peak_host_rss"] == pytest.approx(1.0, abs=0.15)


@pytest.mark.slow
def test_a_plan_that_fits_finishes_under_its_own_limit_and_one_that_does_not_by_a_fifth_fails(
    tmp_path: Path, built_ops: list[str]
) -> None:
    """Limit data (heap and private mappings): the resident memory that a run can be refused."""
    size = ("hidden_size=1024", "intermediate_size=4096", "num_hidden_layers=12")
    model = ("model=tiny-llama", *(f"model.overrides.{setting}" for setting in size))
    overrides = (
        *model,
        "engine=resident",
        "dtype=float32",
        "batch.batch_size=2",
        "batch.prompt_tokens=32",
        "batch.new_tokens=4",
    )
    plan = planned(*overrides, "hardware.accelerator=cpu").plan
    tensors = plan.tier("device").per_rank_bytes
    needed = plan.peak_host_rss_bytes

    def limited_to(count: int) -> Callable[[], None]:
        return lambda: resource.setrlimit(resource.RLIMIT_DATA, (count, count))

    fitting = run(tmp_path, *overrides, limit=limited_to(int(needed * 1.05)))
    assert fitting["status"] == "ok", fitting["reason"]
    too_small = run(tmp_path, *overrides, "plan.enforce=false", limit=limited_to(tensors))
    assert too_small["status"] == "oom_host", too_small["reason"]
    refused = run(tmp_path, *overrides, f"hardware.host_bytes={int(needed * 0.8)}")
    assert refused["status"] == "does_not_fit"
