"""Plan runs in tests, and a calibrated machine whose numbers are round."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from tests.helpers.composing import composed
from zinfer.machine.hardware import detect_hardware
from zinfer.machine.measured import (
    FamilyCost,
    KernelTime,
    LoadCost,
    Mode,
    ModeCost,
    Rate,
    StreamCost,
)
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import model_spec
from zinfer.plan.planned import Planned, plan_run


def planned(*overrides: str, **changes: Any) -> Planned:
    """Plan these overrides, without a calibration.

    Args:
        changes: fields of Hardware that replace those of the machine or box.
    """
    config = composed(*overrides)
    dtype = None if config.dtype.compute == "auto" else config.dtype.compute
    spec = model_spec(config.model, compute_dtype=dtype)
    hardware = replace(detect_hardware(config.hardware, None), **{"profile": None, **changes})
    return plan_run(config, hardware, spec)


def profile(**changes: Any) -> CalibrationProfile:
    """Make a machine where all is round: 10 GFLOP/s whatever the shape, 10 GB/s, 1 ms a layer.

    That millisecond is ZeRO-3's, where it fetches weights.

    Args:
        changes: fields of the profile to replace.
    """
    rows = (1, 16, 256)
    numels = (4096, 65_536, 1_048_576)
    kernels = tuple(
        KernelTime(
            dtype="float32", rows=m, weight_numel=n, wide=wide, seconds=2 * m * n / 10e9, spread=0.0
        )
        for m in rows
        for n in numels
        for wide in (False, True)
    )
    modes = (
        ("none", 1e-5),
        ("nvme", 1e-5),
        ("none, by module", 1e-4),
        ("nvme, by module", 1e-4),
    )
    ten = Rate(median=10e9, spread=0.0)
    found = CalibrationProfile(
        created="2026-01-01T00:00:00Z",
        fingerprint="0" * 12,
        threads=1,
        device_kind="cpu",
        device_name="round",
        seconds=60.0,
        host_read=ten,
        host_copy=ten,
        device_read=None,
        host_to_device_pageable=None,
        host_to_device_pinned=None,
        device_to_host_pinned=None,
        kernels=kernels,
        attention={"float32": ten},
        attention_flops={"float32": ten},
        families=(FamilyCost(model_type="*", dtype="float32", op_s=1e-6, value_s=0.0),),
        modes=(
            ModeCost(mode=Mode("resident"), dtype="float32", step_s=0.002, layer_s=0.0, part_s=0.0),
            *(
                ModeCost(
                    mode=Mode.read(mode),
                    dtype="float32",
                    step_s=0.002,
                    layer_s=0.001,
                    part_s=part_s,
                )
                for mode, part_s in modes
            ),
        ),
        stream=StreamCost(parameter_s=0.0005, bytes_per_s=1e9),
        load={"none": LoadCost(fixed_s=0.5, parameter_s=0.001, bytes_per_s=1e9)},
        imported_rss_bytes=500 << 20,
    )
    return replace(found, **changes)
