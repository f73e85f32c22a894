"""A calibration times matrix products as runs make them: by PyTorch, and a few rows by ours."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from zinfer.job.events import EventLog
from zinfer.machine.measured import KernelTime
from zinfer.plan.own_products import MOST_ROWS
from zinfer.worker import calibrate_kernels
from zinfer.worker.quantised import native


def test_a_few_rows_in_16_bits_are_timed_both_ways(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(reason := native.library(), str):
        pytest.skip(f"needs the compiled kernel: {reason}")
    for name, value in {
        "SQUARE_SIZES": (64,),
        "WIDE_SHAPES": ((32, 256),),
        "ROWS": (1, 4, 64),
        "WIDE_ROWS": (1, 64),
        "COLD_BYTES": 1 << 16,
        "KERNEL_BUDGET_S": 0.0,
    }.items():
        monkeypatch.setattr(calibrate_kernels, name, value)
    found = calibrate_kernels.matrix_products(
        ("float32", "bfloat16"), torch.device("cpu"), EventLog(tmp_path)
    )
    plain, own = ([KernelTime(**row) for row in found[name]] for name in ("kernels", "own_kernels"))
    kinds = [(row.dtype, row.wide, row.rows) for row in plain]
    assert sorted(kinds) == sorted(
        (dtype, wide, rows)
        for dtype in ("float32", "bfloat16")
        for wide, many in ((False, (1, 4, 64)), (True, (1, 64)))
        for rows in many
    )
    assert [(row.dtype, row.wide, row.rows) for row in own] == [
        (dtype, wide, rows)
        for dtype, wide, rows in kinds
        if dtype != "float32"
        if rows <= MOST_ROWS
    ]
    assert all(row.seconds > 0 for row in own)
