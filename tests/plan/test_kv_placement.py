"""Compare bytes and speed of each place of the KV cache with numbers computed by hand."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest

from multirun_analysis.published.rows import read_published
from tests.helpers.composing import composed
from tests.helpers.planning import planned, profile
from zinfer.config import ConfigError
from zinfer.machine.measured import DeviceAttentionTime, HostAttentionTime, PackingTime
from zinfer.model.kv_layout import KvLayer
from zinfer.plan.advice import advice_document
from zinfer.plan.fit import fitting_changes
from zinfer.plan.kv_placement import KvBytes, kv_bytes, kv_problems
from zinfer.plan.kv_seconds import kv_copy_seconds
from zinfer.plan.kv_traffic import HOST_ATTENTION_SHARE, moved_read_bytes
from zinfer.plan.page import kv_lines
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.resolved import resolved_spec
from zinfer.plan.warnings import plan_warnings

OPT_175B = (
    "model=opt-175b", "dtype=float16", "hardware=a6000", "batch=paper", "offload=nvme",
    "batch.batch_size=32", "offload.nvme_path=/local_nvme",
)  # fmt: skip
TINY = ("model=tiny-llama", "dtype=float32", "batch.batch_size=4")
OPT_TOKEN = 96 * 2 * 12288
"""Values that one token adds in OPT-175B: layers, keys and values, hidden size."""


def counted(run: Planned) -> KvBytes:
    found = kv_bytes(run.spec, run.config, run.config.batch.batch_size, on_gpu=True)
    assert found is not None
    return found


def test_opt_175b_with_32_rows_of_544_tokens_keeps_76_5_gib() -> None:
    run = planned(*OPT_175B, "batch.new_tokens=33", "kv_cache=host_attention")
    assert counted(run).host_bytes == OPT_TOKEN * 2 * 32 * 544 == round(76.5 * 2**30)
    assert counted(run).device_bytes == 0
    assert run.plan.kv_cache_bytes == counted(run).total_bytes


@pytest.mark.parametrize(
    ("overrides", "bytes_of_a_head"),
    [
        (("kv_cache.bits=8",), 2 * (128 + 2 * 4)),
        (("kv_cache.bits=4",), 2 * (64 + 2 * 4)),
        (("kv_cache.bits=4", "kv_cache.group_size=128"), 2 * (64 + 4)),
        (("kv_cache.key_bits=8", "kv_cache.value_bits=4"), 128 + 8 + 64 + 8),
        (("kv_cache.value_bits=8",), 2 * 128 + 128 + 8),
    ],
)
def test_codes_have_a_scale_and_a_minimum_for_each_group(
    overrides: tuple[str, ...], bytes_of_a_head: int
) -> None:
    run = planned(*OPT_175B, "kv_cache=host_attention", *overrides)
    assert counted(run).host_bytes == 96 * 96 * bytes_of_a_head * 32 * 543


def test_grouped_heads_are_stored_once() -> None:
    run = planned("model=llama-2-70b", "dtype=float16", "hardware=a6000", "kv_cache=host_attention",
                  "batch=paper", "batch.batch_size=96")  # fmt: skip
    assert counted(run).host_bytes == 80 * 2 * 8 * 128 * 2 * 96 * 543


@pytest.mark.parametrize(("layers_kept", "on_device"), [(0, 0), (1, 1), (95, 95)])
def test_layers_that_stay_are_on_the_device(layers_kept: int, on_device: int) -> None:
    run = planned(*OPT_175B, "kv_cache=host_attention", f"kv_cache.device_layers={layers_kept}")
    layer = 2 * 12288 * 2 * 32 * 543
    assert counted(run).device_bytes == on_device * layer
    assert counted(run).host_bytes == (96 - on_device) * layer


def test_a_window_allocates_its_window_and_host_keeps_two_slots_of_each_shape() -> None:
    run = planned(*TINY, "kv_cache=host", "batch.prompt_tokens=90", "batch.new_tokens=11")
    layers = (
        KvLayer(kind="sliding", values_per_token=64, window=16),
        KvLayer(kind="gqa", values_per_token=64),
        KvLayer(kind="linear_state", values_per_token=0, const_values=10),
    )
    found = kv_bytes(replace(run.spec, kv_layers=layers), run.config, 4, on_gpu=True)
    assert found is not None
    assert found.host_bytes == 4 * 64 * 4 * (16 + 100)
    assert found.device_bytes == 2 * 4 * 64 * 4 * (16 + 100) + 4 * 10 * 4


MIMO = (
    "model=custom", "model.model_type=mimo_v2_flash", "dtype=float32", "batch.batch_size=3",
    "batch.prompt_tokens=30", "batch.new_tokens=11",
    *(f"+model.overrides.{name}" for name in (
        "num_hidden_layers=2", "hidden_size=64", "num_attention_heads=4", "vocab_size=199",
        "num_key_value_heads=2", "intermediate_size=96", "moe_intermediate_size=32",
        "head_dim=64", "v_head_dim=32", "max_position_embeddings=64", "num_local_experts=4",
        "n_routed_experts=4", "num_experts_per_tok=2", "sliding_window=8",
        "layer_types=[full_attention,sliding_attention]", "mlp_layer_types=[dense,sparse]",
    )),
)  # fmt: skip


@pytest.mark.parametrize(
    ("bits", "key_bytes", "value_bytes"),
    [
        ((), 64 * 4, 32 * 4),
        (("kv_cache.bits=8",), 64 + 2 * 4, 32 + 4),
        (("kv_cache.key_bits=8",), 64 + 2 * 4, 32 * 4),
        (("kv_cache.value_bits=4",), 64 * 4, 16 + 4),
        (("kv_cache.key_bits=8", "kv_cache.value_bits=4"), 64 + 2 * 4, 16 + 4),
    ],
)
def test_keys_and_values_of_other_lengths_are_counted_apart(
    bits: tuple[str, ...], key_bytes: int, value_bytes: int
) -> None:
    """MiMo-V2-Flash: two KV heads with all 40 tokens, four with a window of eight."""
    found = counted(planned(*MIMO, "kv_cache=host", "kv_cache.group_size=32", *bits))
    a_row = (2 * 40 + 4 * 8) * (key_bytes + value_bytes)
    assert found.host_bytes == 3 * a_row
    assert found.device_bytes == 2 * 3 * (2 * 40 + 4 * 8) * (64 + 32) * 4


def test_a_group_must_divide_keys_and_values_where_they_are_packed() -> None:
    both, keys = (
        planned(*MIMO, "kv_cache=host", f"kv_cache.{name}=8") for name in ("bits", "key_bits")
    )
    said = list(kv_problems(both.spec, both.config))
    assert len(said) == 1 and "the values of " in said[0], "keys are 64 long: 64 divides them"
    assert said[0].endswith(", 32. Set kv_cache.group_size=32")
    assert not list(kv_problems(keys.spec, keys.config))


def step_of(*overrides: str, **changes: Any) -> Any:
    return planned(*overrides, **changes).prediction.ceiling.decode_step


def test_each_placement_adds_its_bytes_where_they_move() -> None:
    base = step_of(*OPT_175B).demand
    read = OPT_TOKEN * 2 * 32 * (512 + 16)
    token, query = OPT_TOKEN * 2 * 32, OPT_TOKEN * 32
    host = step_of(*OPT_175B, "kv_cache=host").demand
    assert host.host_device_link_bytes == base.host_device_link_bytes + read
    assert host.host_memory_bytes == base.host_memory_bytes + read
    attended = step_of(*OPT_175B, "kv_cache=host_attention").demand
    assert attended.host_device_link_bytes == base.host_device_link_bytes + query
    assert attended.host_memory_bytes == base.host_memory_bytes + read
    assert attended.device_memory_bytes == base.device_memory_bytes - read
    resident = step_of(*OPT_175B, "kv_cache=host_attention", "offload=none").demand
    assert resident.host_device_link_bytes == query + token, "the way back carries more"


def test_a_prefill_sends_the_prompt_to_the_host_once_beside_the_weights() -> None:
    prompt = OPT_TOKEN * 2 * 32 * 512
    kept = planned(*OPT_175B, "offload=none").prediction.ceiling.prefill.demand
    moved = planned(*OPT_175B, "offload=none", "kv_cache=host").prediction.ceiling.prefill.demand
    assert kept.host_device_link_bytes == 0
    assert moved.host_device_link_bytes == prompt
    streamed = planned(*OPT_175B, "kv_cache=host").prediction.ceiling.prefill.demand
    weights = planned(*OPT_175B).prediction.ceiling.prefill.demand
    assert streamed.host_device_link_bytes == weights.host_device_link_bytes > prompt


def test_published_rows_with_the_cache_on_the_host_are_below_their_ceilings() -> None:
    rows = [
        row
        for row in read_published()
        if row.source.startswith("DeepSpeedExamples zero_inference README (2023-09)")
        and row.framework.startswith("DeepSpeed ZeRO-Inference >=")
        and row.kv_location == "cpu"
        and row.tokens_per_s
    ]
    assert len(rows) == 10
    for row in rows:
        dtype = ("dtype=int4", "dtype.compute=float16") if row.weights_bits == 4 else ()
        run = planned(
            "hardware=a6000", "batch=paper", "dtype=float16", "kv_cache=host_attention", *dtype,
            f"model={row.model}", f"batch.batch_size={row.batch_size}", f"offload={row.offload}",
            "offload.nvme_path=/local_nvme",
        )  # fmt: skip
        assert run.fits
        best = run.prediction.ceiling.generated_tokens_per_s
        assert best is not None and row.tokens_per_s is not None and row.tokens_per_s < best


def test_a_prediction_reads_the_cache_at_the_kernels_share_of_host_memory() -> None:
    found = profile()
    parts = {}
    for placement in ("device", "host", "host_attention"):
        run = planned(*TINY, "hardware.accelerator=cpu", f"kv_cache={placement}")
        run = plan_run(run.config, replace(run.hardware, profile=found), run.spec)
        parts[placement] = run.prediction.parts
        assert run.prediction.decode_step_s
    batch, layers = run.config.batch, run.spec.kv_layers
    assert layers is not None
    context = int(batch.prompt_tokens + batch.new_tokens / 2)
    read = 4 * 4 * context * sum(layer.values_per_token for layer in layers)
    grouped = run.spec.num_attention_heads >= 4 * run.spec.num_kv_heads
    share = HOST_ATTENTION_SHARE["compiled", grouped]
    assert parts["device"]["attention"] == pytest.approx(2 * read / 10e9)
    assert parts["host"]["attention"] == pytest.approx(read / 10e9)
    assert parts["host"]["kv cache to the device"] == pytest.approx(2 * read / 10e9), (
        "read, written"
    )
    assert parts["host_attention"]["attention"] == 0
    assert parts["host_attention"]["attention on the host"] == pytest.approx(read / 10e9 / share)


@pytest.mark.parametrize(
    ("bits", "rates"),
    [((), (5e9, 5e9)), (("kv_cache.key_bits=8", "kv_cache.value_bits=4"), (4e9, 2e9))],
    ids=["as computed", "keys in 8 bits, values in 4"],
)
def test_a_calibrated_kernel_predicts_attention_on_the_host(
    bits: tuple[str, ...], rates: tuple[float, float]
) -> None:
    measured = tuple(
        HostAttentionTime(
            bits=each, dtype="float32", shared_by=by, kv_bytes=10**6, seconds=by * 1e6 / rate,
            spread=0.0,
        )
        for each, rate in ((16, 5e9), (8, 4e9), (4, 2e9))
        for by in (1, 8)
    )  # fmt: skip
    run = planned(
        "model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu", "offload=none",
        "kv_cache=host_attention", "kv_cache.group_size=16", "batch.batch_size=64",
        "batch.prompt_tokens=1000", *bits, profile=profile(host_attention=measured),
    )  # fmt: skip
    heads = run.spec.num_attention_heads / run.spec.num_kv_heads
    by = 1 if heads < math.sqrt(8) else 8
    context = run.config.batch.prompt_tokens + run.config.batch.new_tokens / 2
    _, stored = moved_read_bytes(run.spec, run.config, 64, context)
    assert run.prediction.parts["attention on the host"] == pytest.approx(
        by * stored / 2 * (1 / rates[0] + 1 / rates[1]), rel=1e-2
    )


@pytest.mark.parametrize(("slot", "read_per_s"), [(None, 1e8), (2e7, 2e7)])
def test_attention_on_the_device_is_predicted_layer_by_layer(
    slot: float | None, read_per_s: float
) -> None:
    """An older calibration has no times of slots: attention over a grown cache stands for them."""
    measured = tuple(
        DeviceAttentionTime(
            dtype="float32", shared_by=by, kv_bytes=size, grow_s=size / 1e9,
            attend_s=size * by / 1e8, spread=0.0, slot_s=slot and size * by / slot,
        )
        for by in (1, 8)
        for size in (10**3, 10**6)
    )  # fmt: skip
    found = profile(device_attention=measured)
    base = (*TINY, "hardware.accelerator=cpu", "offload=none", "batch.prompt_tokens=500")
    parts = {
        placement: planned(*base, placement, profile=found).prediction.parts
        for placement in ("kv_cache=device", "kv_cache=host", "kv_cache=host_attention")
    }
    kept = planned(*base, "kv_cache=host_attention", "kv_cache.device_layers=1", profile=found)
    spec, batch = kept.spec, kept.config.batch
    assert spec.kv_layers is not None and spec.num_attention_heads < 3 * spec.num_kv_heads
    layer = 4 * spec.kv_layers[0].values_per_token * 4 * int(500 + batch.new_tokens / 2)
    both = layer / 1e9 + layer / 1e8
    assert parts["kv_cache=device"]["attention"] == pytest.approx(spec.num_layers * both)
    attended = spec.num_layers * layer / read_per_s
    assert parts["kv_cache=host"]["attention"] == pytest.approx(attended), "a slot does not grow"
    assert parts["kv_cache=host_attention"]["attention"] == 0
    assert kept.prediction.parts["attention"] == pytest.approx(both)


@pytest.mark.parametrize(("bits", "halves"), [("kv_cache.bits=8", 2), ("kv_cache.value_bits=8", 1)])
def test_packing_is_predicted_for_the_prompt_and_for_each_new_token(bits: str, halves: int) -> None:
    measured = tuple(
        PackingTime(bits=8, dtype="float32", values=values, seconds=values / 1e6, spread=0.0)
        for values in (10, 10**6)
    )
    found = profile(host_packing=measured)
    run = planned(
        *TINY, "hardware.accelerator=cpu", "offload=none", "kv_cache=host_attention", bits,
        "kv_cache.group_size=16", "batch.prompt_tokens=100", profile=found,
    )  # fmt: skip
    assert run.spec.kv_layers is not None
    a_token = 4 * sum(layer.values_per_token for layer in run.spec.kv_layers) / 2
    plain = 2 * 4 * a_token * (2 - halves) / 10e9  # float32, read and written
    prompt = kv_copy_seconds(run.spec, run.config, found, 100, 100)
    assert prompt == {"kv cache to the host": pytest.approx(100 * (halves * a_token / 1e6 + plain))}
    step = run.prediction.parts["kv cache to the host"]
    assert step == pytest.approx(halves * a_token / 1e6 + plain)


@pytest.mark.parametrize(
    ("bits", "measured_bits", "halves"),
    [
        (("kv_cache.bits=8",), (8,), (8, 8)),
        (("kv_cache.key_bits=8", "kv_cache.value_bits=4"), (8, 4), (8, 4)),
        (("kv_cache.key_bits=8",), (8,), (8, 16)),
        (("kv_cache.bits=8",), (), None),
        (("kv_cache.key_bits=8", "kv_cache.value_bits=4"), (8,), None),
    ],
)
def test_unpacking_into_slots_is_predicted_layer_by_layer(
    bits: tuple[str, ...], measured_bits: tuple[int, ...], halves: tuple[int, ...] | None
) -> None:
    """A calibration that lacks one of the two counts all as a copy, as older ones do."""
    values_per_s = {8: 1e8, 4: 3e7}
    measured = tuple(
        PackingTime(
            bits=wanted, dtype="float32", values=values, seconds=values / values_per_s[wanted],
            spread=0.0,
        )
        for wanted in measured_bits
        for values in (10, 10**6)
    )  # fmt: skip
    run = planned(
        *TINY, "hardware.accelerator=cpu", "offload=none", "kv_cache=host", *bits,
        "kv_cache.group_size=16", "batch.prompt_tokens=100", profile=profile(),
    )  # fmt: skip
    found = profile(host_unpacking=measured)
    plain, stored = moved_read_bytes(run.spec, run.config, run.config.batch.batch_size, 100)
    step = kv_copy_seconds(run.spec, run.config, found, 1, 100)
    assert step is not None
    if halves is None:
        assert step["kv cache to the device"] == pytest.approx((plain + stored) / 10e9)
        return
    rates = values_per_s | {16: 10e9 / 2 / 4}  # float32, read and written
    half = plain / 2 / 4
    assert step["kv cache to the device"] == pytest.approx(sum(half / rates[b] for b in halves))


LLAMA = ("model=llama-2-70b", "batch=paper", "dtype=int4", "dtype.compute=float16",
         "hardware=a6000", "offload=cpu", "batch.batch_size=200")  # fmt: skip


@pytest.mark.parametrize(
    ("rate", "fastest"), [("100e9", "kv_cache=host_attention"), ("5e9", "kv_cache=host")]
)
def test_advice_names_the_fastest_placement_that_fits(rate: str, fastest: str) -> None:
    run = planned(*LLAMA, f"hardware.host_memory_bytes_per_s={rate}")
    advice = advice_document(run)["kv_cache"]
    if fastest == "kv_cache=host":  # both read host memory: the link decides only where it is slow
        fastest = advice["fastest"]
        steps = {row["override"]: row["decode_step_s"] for row in advice["placements"]}
        assert steps["kv_cache=host_attention"] == pytest.approx(steps["kv_cache=host"], rel=0.02)
    assert advice["fastest"] == fastest
    assert "kv_cache=device does not fit" in advice["why"]
    assert [row["fits"] for row in advice["placements"]] == [False] + 6 * [True]
    assert any("host_attention, 4 bits" in line for line in kv_lines(advice))


def test_an_unknown_rate_of_host_memory_is_said_and_never_wins() -> None:
    advice = advice_document(planned(*LLAMA))["kv_cache"]
    assert advice["fastest"] == "kv_cache=host"
    assert "kv_cache=host_attention is faster from" in advice["why"]
    assert [row["leaves_out_host_memory"] for row in advice["placements"]] == 4 * [False] + 3 * [
        True
    ]


def test_a_shortfall_tries_the_cache_in_host_memory() -> None:
    changes = fitting_changes(planned(*LLAMA))
    assert {"kv_cache=host", "kv_cache=host_attention"} <= set(changes)
    tight = planned(*LLAMA, "kv_cache=host", host_available_bytes=68 << 30)
    assert not tight.fits
    assert "kv_cache.bits=8" in fitting_changes(tight)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("kv_cache=host",), "only costs time"),
        (("kv_cache=host_attention", "kv_cache.bits=4"), "keys in 4 bits suffer first"),
        (("kv_cache=host_attention", "kv_cache.pin_memory=true"), "has no effect"),
    ],
)
def test_a_plan_warns_of_what_gains_nothing(overrides: tuple[str, ...], says: str) -> None:
    run = planned(*TINY, "hardware.accelerator=cpu", "kv_cache.group_size=16", *overrides)
    assert any(says in warning for warning in plan_warnings(run))


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("model=deepseek-v3", "kv_cache=host_attention"), "MLA"),
        (("model=opt-125m", "kv_cache=host", "kv_cache.device_layers=13"), "has 12 layers"),
        (("model=opt-125m", "kv_cache=host", "kv_cache.device_layers=12"),
         "Set kv_cache.device_layers=11 or fewer, or kv_cache=device"),
        (("model=opt-2.7b", "kv_cache=host", "kv_cache.bits=8"), "kv_cache.group_size=80"),
        (("model=tiny-opt", "model.overrides.hidden_size=160", "kv_cache=host", "kv_cache.bits=8"),
         "kv_cache.group_size=40"),
        (("model=tiny-opt", "model.overrides.hidden_size=92", "kv_cache=host", "kv_cache.bits=4"),
         "Set kv_cache.bits=16"),
        (("model=tiny-opt", "model.overrides.hidden_size=160", "kv_cache=host_attention",
          "kv_cache.kernel=compiled"), "a head dimension of 40"),
        (("model=opt-125m", "kv_cache=host_attention", "kv_cache.kernel=compiled",
          "kv_cache.bits=4", "kv_cache.group_size=16"), "a multiple of 32, not of 16"),
        (("model=gpt-oss-20b", "kv_cache=host", "kv_cache.bits=8", "kv_cache.group_size=48"),
         "kv_cache.group_size=64"),
    ],
)  # fmt: skip
def test_what_a_models_cache_cannot_do_is_refused(overrides: tuple[str, ...], says: str) -> None:
    config = composed(*overrides, "hardware=a6000", "dtype=bfloat16")
    hardware = planned("model=opt-125m", "hardware=a6000", "dtype=bfloat16").hardware
    with pytest.raises(ConfigError, match=says):
        resolved_spec(config, hardware, lambda warning: None)
