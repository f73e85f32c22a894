"""A machine says in which dtype it is fast, with numbers where it was calibrated."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.planning import planned, profile
from zinfer.machine import processor
from zinfer.machine.profile import CalibrationProfile
from zinfer.plan.advice import suggestions
from zinfer.plan.dtype_advice import dtype_warnings

AVX2 = "fpu sse4_2 avx f16c avx2 fma"
FLAGS = [  # flags of /proc/cpuinfo, as they are called, types without arithmetic
    (AVX2, "avx2 only", ("bfloat16",)),
    (f"{AVX2} avx512f avx512bw", "avx512f only", ("bfloat16",)),
    (f"{AVX2} avx512f avx512_bf16", "avx512f, avx512_bf16", ()),
    (
        f"{AVX2} avx512f avx512_bf16 avx512_fp16 amx_bf16",
        "avx512f, amx, avx512_bf16, avx512_fp16",
        (),
    ),
    ("fp asimd fphp asimdhp sve bf16", "sve, bf16, fp16", ()),
    ("fp asimd", "asimd only", ("bfloat16",)),
    ("fpu", "no vectors only", ("bfloat16",)),
    ("", None, ()),
]  # fmt: skip


@pytest.mark.parametrize(("flags", "shown", "emulated"), FLAGS)
def test_a_processor_is_named_by_the_sets_that_multiply_matrices(
    tmp_path: Path, flags: str, shown: str | None, emulated: tuple[str, ...]
) -> None:
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/cpuinfo").write_text(f"model name\t: AMD EPYC\nflags\t\t: {flags}\n")
    found = processor.cpu_flags(tmp_path)
    assert processor.instruction_sets(found) == shown
    assert processor.emulated_dtypes(found) == emulated
    described = "AMD EPYC" if shown is None else f"AMD EPYC ({shown})"
    assert processor.cpu_description(tmp_path) == described


def slow_in_bfloat16(times: float) -> CalibrationProfile:
    """Slow the round machine: products in bfloat16 take so many times as long."""
    round_one = profile()
    kernels = [
        replace(row, dtype="bfloat16", seconds=times * row.seconds) for row in round_one.kernels
    ]
    ten = round_one.host_copy
    return profile(
        kernels=(*round_one.kernels, *kernels),
        attention={"float32": ten, "bfloat16": ten},
        attention_flops={"float32": ten, "bfloat16": ten},
        families=(
            *round_one.families,
            *(replace(row, dtype="bfloat16") for row in round_one.families),
        ),
        modes=(*round_one.modes, *(replace(row, dtype="bfloat16") for row in round_one.modes)),
    )


def said(dtype: str, **changes: Any) -> str:
    box = {
        "device_dtypes": ("float32", "bfloat16"),
        "device_name": "AMD EPYC (avx2 only)",
        "device_flops_per_s": {},
        "device_memory_bytes_per_s": None,
        "host_memory_bytes_per_s": None,
        "host_available_bytes": None,
        **changes,
    }
    run = planned("model=opt-125m", f"dtype={dtype}", "hardware.accelerator=cpu", **box)
    return "\n".join(dtype_warnings(run))


def test_a_calibrated_machine_says_what_the_other_type_would_gain_in_each_phase() -> None:
    words = said("bfloat16", profile=slow_in_bfloat16(8.0), emulated_dtypes=("bfloat16",))
    assert words.startswith("AMD EPYC (avx2 only) has no bfloat16 arithmetic. Set dtype=float32:")
    assert "prefill 7." in words and "decode " in words


def test_a_machine_that_has_the_arithmetic_and_is_slow_all_the_same_says_so() -> None:
    assert "is slow in bfloat16. Set dtype=float32" in said("bfloat16", profile=slow_in_bfloat16(3))


@pytest.mark.parametrize(
    ("dtype", "changes"),
    [
        ("bfloat16", {"profile": slow_in_bfloat16(1.0)}),
        ("bfloat16", {"profile": slow_in_bfloat16(0.5), "emulated_dtypes": ("bfloat16",)}),
        ("float32", {"profile": slow_in_bfloat16(8.0), "emulated_dtypes": ("bfloat16",)}),
        ("float32", {"emulated_dtypes": ("bfloat16",)}),
        ("bfloat16", {}),
        ("int8", {"emulated_dtypes": ("bfloat16",)}),
    ],
)
def test_nothing_is_said_where_nothing_is_to_be_gained(dtype: str, changes: dict[str, Any]) -> None:
    assert said(dtype, **changes) == ""


def test_an_uncalibrated_machine_without_the_arithmetic_says_so_without_numbers() -> None:
    words = said("bfloat16", emulated_dtypes=("bfloat16",))
    assert "has no bfloat16 arithmetic and emulates it. Try dtype=float32" in words
    assert "task=calibrate" in words


def test_a_type_that_does_not_fit_is_not_advised() -> None:
    box = {"emulated_dtypes": ("bfloat16",), "host_available_bytes": 1 << 20}
    assert said("bfloat16", **box) == ""


def test_the_plan_suggests_the_type_that_the_machine_is_fast_in() -> None:
    run = planned(
        "model=opt-125m",
        "dtype=bfloat16",
        "hardware.accelerator=cpu",
        profile=slow_in_bfloat16(8.0),
        emulated_dtypes=("bfloat16",),
        device_dtypes=("float32", "bfloat16"),
        device_flops_per_s={},
        device_memory_bytes_per_s=None,
        host_memory_bytes_per_s=None,
        host_available_bytes=None,
    )
    gains = {entry.override: entry.gain for entry in suggestions(run, None)}
    assert (gains["dtype=float32"] or 0) > 3
