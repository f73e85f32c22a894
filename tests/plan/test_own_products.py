"""Predictions take the faster product of a few rows, where a run may take it."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.helpers.planning import planned, profile
from zinfer.machine.profile import CalibrationProfile
from zinfer.machine.profile_files import document_of, profile_from_document
from zinfer.plan.own_products import linear_shapes, own_rows
from zinfer.plan.product_seconds import products_seconds

CPU = "hardware.accelerator=cpu"
MODEL = ("model=llama-2-7b", "offload=none", "batch.batch_size=4", CPU)


def calibrated(times: float | None) -> CalibrationProfile:
    """Calibrate bfloat16, with our kernel so many times as fast as PyTorch; None: not timed."""
    kernels = tuple(replace(row, dtype="bfloat16") for row in profile().kernels)
    own = tuple(
        replace(row, seconds=row.seconds / times) for row in kernels if times and row.rows <= 16
    )
    return profile(kernels=kernels, own_kernels=own)


def seconds(times: float | None, *overrides: str, new: int = 1) -> float:
    run = planned(*MODEL, "dtype=bfloat16", *overrides)
    found = products_seconds(
        run.spec, run.config, calibrated(times), run.config.batch.batch_size, new
    )
    assert found is not None
    return found


def test_a_decode_step_takes_the_faster_products() -> None:
    assert seconds(2.0) == pytest.approx(seconds(None) / 2)
    assert seconds(0.5) == seconds(1.01) == seconds(None)
    assert seconds(0.5, "dtype.kernel=compiled") == pytest.approx(2 * seconds(None))


@pytest.mark.parametrize("setting", ["dtype.kernel=torch", "engine=resident", "zero=paper"])
def test_baselines_are_predicted_with_pytorchs_products(setting: str) -> None:
    assert seconds(2.0, setting) == seconds(None, setting)


def test_a_prefill_takes_pytorchs_products_but_for_the_head() -> None:
    """The head sees the last token of each row only: as few rows as a decode step."""
    saved = seconds(None, new=512) - seconds(2.0, new=512)
    run = planned(*MODEL, "dtype=bfloat16")
    head = calibrated(None).kernel_s("bfloat16", 4, 32_000 * 4096, wide=True)
    assert run.config.batch.batch_size == 4 and head is not None
    assert saved == pytest.approx(head / 2)


def test_more_rows_than_the_kernel_takes_are_predicted_with_pytorchs_products() -> None:
    assert seconds(2.0, "batch.batch_size=33") == seconds(None, "batch.batch_size=33")


def test_experts_in_one_tensor_are_pytorchs() -> None:
    run = planned("model=mixtral-8x7b", "dtype=bfloat16", CPU)
    shapes = linear_shapes(run.spec, run.config)
    assert shapes and not any(14_336 in shape for shape in shapes)


def test_a_tied_head_is_a_linear_layer() -> None:
    run = planned("model=opt-125m", "dtype=bfloat16", CPU)
    assert linear_shapes(run.spec, run.config)[50_272, 768] == 1


def test_layers_that_stay_unpacked_have_a_choice() -> None:
    common = ("model=llama-2-7b", "dtype=int8", "dtype.compute=bfloat16", CPU)
    packed, kept = planned(*common), planned(*common, "dtype.keep=[down_proj]")
    assert not linear_shapes(packed.spec, packed.config)
    assert linear_shapes(kept.spec, kept.config) == {(4096, 11_008): 32}


@pytest.mark.parametrize(
    ("overrides", "dtype", "rows"),
    [
        ((), "bfloat16", 4),
        ((), "float16", 4),
        ((), "float32", 0),
        (("batch.batch_size=32",), "bfloat16", 32),
        (("batch.batch_size=33",), "bfloat16", 0),
        (("batch.batch_size=64", "launcher.ranks=2"), "bfloat16", 32),
        (("dtype.kernel=torch",), "bfloat16", 0),
        (("dtype.kernel=compiled", "batch.batch_size=64"), "bfloat16", 64),
        (("engine=resident",), "bfloat16", 0),
        (("zero=paper",), "bfloat16", 0),
        (("dtype=int8", "dtype.compute=bfloat16", "dtype.kernel=unpack"), "bfloat16", 0),
    ],
)
def test_the_rows_that_our_kernel_may_multiply(
    overrides: tuple[str, ...], dtype: str, rows: int
) -> None:
    config = planned(*MODEL, "dtype=bfloat16", *overrides).config
    assert own_rows(config, dtype) == rows


def test_profiles_keep_our_products_and_older_ones_have_none() -> None:
    document = document_of(calibrated(2.0))
    assert profile_from_document(document).own_kernels == calibrated(2.0).own_kernels
    del document["own_kernels"]
    assert profile_from_document(document).own_kernels == ()
