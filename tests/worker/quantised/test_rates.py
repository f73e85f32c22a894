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
    assert [(row.weight_numel, row.rows, row.activation_bits) for row in found] == [
        (numel, rows, activation_bits)
        for numel in (4096, 16_384)
        for rows in (1, 4)
        for activation_bits in (16, 8)
    ]
    assert all(row.seconds > 0 and row.bits == bits for row in found)
