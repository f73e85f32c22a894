"""The published DeepSpeed JSON key for key, and rules that the tuned one must keep."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.composing import choices, composed
from zinfer.model.spec import model_spec
from zinfer.plan.deepspeed_json import deepspeed_json, derivation_warnings, min_buffer_count
from zinfer.plan.zero_layout import zero_layout
from zinfer.units import GIB, MIB

AIO = {
    "block_size": 16 * MIB,
    "queue_depth": 64,
    "thread_count": 8,
    "use_gds": False,
    "single_submit": False,
    "overlap_events": True,
}
INT4 = {
    "weight_quantization": {
        "quantized_initialization": {
            "num_bits": 4,
            "group_size": 64,
            "group_dim": 1,
            "symmetric": False,
        }
    }
}


def published(
    hidden_size: int, batch: int, dtype: str, offload: dict[str, Any] | None, **more: Any
) -> dict[str, Any]:
    """Build by hand the JSON of DeepSpeedExamples' run_model.py, get_ds_model.

    Source: inference/huggingface/zero_inference.
    """
    zero: dict[str, Any] = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2 * hidden_size * hidden_size,
        "stage3_param_persistence_threshold": hidden_size,
        "stage3_max_live_parameters": 2 * hidden_size * hidden_size,
    }
    if offload:
        zero["offload_param"] = offload
    return {
        "fp16": {"enabled": dtype == "float16"},
        "bf16": {"enabled": dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 2000,
        "train_batch_size": batch,
        "wall_clock_breakdown": False,
        **more,
    }


def nvme(count: int, numel: int, **more: Any) -> dict[str, Any]:
    return {
        "device": "nvme",
        "pin_memory": False,
        "nvme_path": "/local_nvme",
        "buffer_count": count,
        "buffer_size": numel,
        **more,
    }


PAPER = [  # overrides, what the published example emits for them
    (("model=opt-30b",), published(7168, 1, "float16", None)),
    (
        ("model=opt-66b", "offload=cpu", "batch.batch_size=24"),
        published(9216, 24, "float16", {"device": "cpu", "pin_memory": False}),
    ),
    (
        (
            "model=opt-66b",
            "offload=cpu",
            "offload.pin_memory=true",
            "dtype=int4",
            "dtype.compute=float16",
        ),
        published(9216, 1, "float16", {"device": "cpu", "pin_memory": True}, **INT4),
    ),
    (("model=opt-175b", "offload=nvme"), published(12288, 1, "float16", nvme(5, 2 * GIB), aio=AIO)),
    (
        ("model=bloom-176b", "offload=nvme", "batch.batch_size=8"),
        published(14336, 8, "bfloat16", nvme(5, 9 * GIB), aio=AIO),
    ),
    (
        ("model=bloom-176b", "offload=nvme", "offload.use_gds=true"),
        published(14336, 1, "bfloat16", nvme(3, 8 * GIB), aio={**AIO, "use_gds": True}),
    ),
    (
        ("model=llama-2-70b", "offload=nvme"),
        published(8192, 1, "float16", nvme(5, 2 * GIB), aio=AIO),
    ),
    (
        ("model=llama-3-70b", "offload=nvme", "batch.batch_size=96"),
        published(8192, 96, "bfloat16", nvme(5, 2 * GIB), aio=AIO),
    ),
    (
        ("model=mixtral-8x22b", "offload=nvme"),
        published(6144, 1, "bfloat16", nvme(10, 1 * GIB), aio=AIO),
    ),
    (
        ("model=mixtral-8x22b", "offload=nvme", "offload.use_gds=true", "offload.pin_memory=true"),
        published(
            6144, 1, "bfloat16", nvme(10, 1 * GIB, pin_memory=True), aio={**AIO, "use_gds": True}
        ),
    ),
]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    PAPER,
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_paper_emits_what_the_published_example_emits(
    overrides: tuple[str, ...], expected: dict[str, Any]
) -> None:
    config = composed("zero=paper", *overrides)
    spec = model_spec(
        config.model, compute_dtype=None if config.dtype.compute == "auto" else config.dtype.compute
    )
    assert deepspeed_json(config, spec) == expected


# model, elements: measured by running DeepSpeed 0.19.8 at N and N - 1 elements
SMALLEST_BUFFER = [
    ("opt-30b", 360_349_696),  # embed_tokens 50272 x 7168
    ("opt-175b", 617_742_336),  # embed_tokens 50272 x 12288
    ("bloom-176b", 3_596_615_680),  # word_embeddings 250880 x 14336
    ("llama-2-70b", 262_144_000),  # embed_tokens 32000 x 8192
    ("mixtral-8x7b", 939_524_096),  # fused experts' gate and up projections, 8 x 28672 x 4096
]


@pytest.mark.parametrize(("model", "numel"), SMALLEST_BUFFER)
def test_tuned_nvme_buffers_are_the_largest_parameter(model: str, numel: int) -> None:
    config = composed(f"model={model}", "offload=nvme")
    assert (
        deepspeed_json(config, model_spec(config.model))["zero_optimization"]["offload_param"][
            "buffer_size"
        ]
        == numel
    )


IGNORED_KEYS = {"thread_count", "max_in_cpu"}


@pytest.mark.parametrize("model", [name for name in choices("model") if name != "custom"])
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
def test_every_model_derives_and_tuned_keeps_the_rules(model: str, offload: str) -> None:
    for dtype in ("bfloat16", "float32", "int4"):
        config = composed(f"model={model}", f"offload={offload}", f"dtype={dtype}")
        spec = model_spec(config.model, compute_dtype=config.dtype.compute)
        layout = zero_layout(config, spec)
        derived = deepspeed_json(config, spec)
        zero = derived["zero_optimization"]
        if offload == "nvme":
            staging = zero["offload_param"]
            assert staging["buffer_size"] >= layout.largest_swapped_numel
            assert (
                staging["buffer_count"]
                >= min_buffer_count(layout, spec, leaf="leaf_module" in zero)
                >= 2
            )
            assert zero["stage3_param_persistence_threshold"] < layout.swap_min_numel, (
                "wrong tokens from here on"
            )
            assert not IGNORED_KEYS & (derived["aio"].keys() | staging.keys())
            assert derived["aio"]["block_size"] & (derived["aio"]["block_size"] - 1) == 0
        else:
            assert "aio" not in derived


def test_a_threshold_that_would_corrupt_tokens_is_lowered_and_said() -> None:
    config = composed("offload=nvme", "zero.persistence_threshold_numel=10000000", "dtype=bfloat16")
    spec = model_spec(config.model, compute_dtype="bfloat16")
    assert (
        deepspeed_json(config, spec)["zero_optimization"]["stage3_param_persistence_threshold"]
        == 524_287
    )
    assert any("wrong tokens" in warning for warning in derivation_warnings(config, spec))


def test_staging_buffers_stay_within_the_limit_but_never_below_what_works() -> None:
    config = composed("model=mixtral-8x7b", "offload=nvme")
    spec = model_spec(config.model)
    roomy = deepspeed_json(config, spec)["zero_optimization"]["offload_param"]["buffer_count"]
    tight = deepspeed_json(config, spec, staging_limit_bytes=1)["zero_optimization"][
        "offload_param"
    ]["buffer_count"]
    assert (
        roomy == 12
    )  # twice the six swapped parameters of a layer: four of attention, two of the fused experts
    assert tight == min_buffer_count(zero_layout(config, spec), spec, leaf=False) < roomy


LEAVES = [  # overrides, classes of the leaves
    (("model=llama-2-7b", "offload=cpu"), ["LlamaDecoderLayer"]),
    (("model=bloom-560m", "offload=nvme"), ["BloomBlock"]),
    (
        ("model=mixtral-8x7b", "offload=cpu"),
        ["MixtralDecoderLayer"],
    ),  # its experts are fused: one parameter
    (("model=mixtral-8x7b", "offload=none"), ["MixtralForCausalLM"]),
    (("model=llama-2-7b", "offload=none", "dtype=int4"), ["LlamaForCausalLM"]),
    (("model=deepseek-v3", "offload=none"), ["DeepseekV3ForCausalLM"]),
    (("model=llama-2-7b", "offload=none", "zero=paper"), None),
    (("model=llama-2-7b", "offload=none", "zero.leaf_layers=true"), ["LlamaDecoderLayer"]),
    (("model=llama-2-7b", "offload=none", "zero.leaf_layers=false"), None),
    (
        ("model=llama-2-7b", "offload=none", "zero.persistence_threshold_numel=4096"),
        ["LlamaDecoderLayer"],
    ),
    (
        ("model=llama-2-7b", "offload=none", "launcher.ranks=2", "batch.batch_size=2"),
        ["LlamaDecoderLayer"],
    ),
    (("model=llama-2-7b", "offload=cpu", "dtype=int4"), ["LlamaDecoderLayer"]),
    (("model=llama-2-7b", "offload=cpu", "dtype=int4", "zero=paper"), None),
    (("model=llama-2-7b", "offload=cpu", "zero.leaf_layers=false"), None),
    (("model=llama-2-7b", "offload=cpu", "zero=paper"), None),
    (
        ("model=llama-2-7b", "offload=nvme", "offload.buffer_count=6"),
        None,
    ),  # a layer has seven matrices
    (("model=llama-2-7b", "offload=nvme", "offload.buffer_count=7"), ["LlamaDecoderLayer"]),
    (
        ("model=llama-2-7b", "offload=nvme", "offload.buffer_count=6", "zero.leaf_layers=true"),
        ["LlamaDecoderLayer"],
    ),
]


@pytest.mark.parametrize(
    ("overrides", "classes"),
    LEAVES,
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_decoder_layers_are_leaves_where_that_is_possible(
    overrides: tuple[str, ...], classes: list[str] | None
) -> None:
    config = composed(*overrides)
    spec = model_spec(config.model, compute_dtype="bfloat16")
    zero = deepspeed_json(config, spec)["zero_optimization"]
    assert zero.get("leaf_module", {}).get("classes") == classes


def test_paper_says_what_it_emits_in_vain() -> None:
    config = composed("model=opt-30b", "offload=nvme", "zero=paper")
    warnings = " ".join(derivation_warnings(config, model_spec(config.model)))
    assert "thread_count" in warnings
    assert "20.0 GiB" in warnings
