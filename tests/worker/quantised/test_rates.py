"""A calibration times the products with packed weights that a run would make."""

from __future__ import annotations

import pytest
import torch

from zinfer.machine.measured import PackedTime
from zinfer.worker.quantised import rates


@pytest.mark.parametrize("bits", [8, 4])
def test_every_size_and_number_of_rows_has_its_time(
    bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rates, "SQUARE_SIZES", (64, 128))
    monkeypatch.setattr(rates, "ROWS", (1, 4))
    monkeypatch.setattr(rates, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(rates, "BUDGET_S", 0.0)
    found = [PackedTime(**row) for row in rates.packed_times(bits, "float32", torch.device("cpu"))]
    assert [(row.weight_numel, row.rows) for row in found] == [
        (4096, 1),
        (4096, 4),
        (16_384, 1),
        (16_384, 4),
    ]
    assert all(row.seconds > 0 and row.bits == bits for row in found)
