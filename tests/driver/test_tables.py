"""The table of a plan says of each row what the plan says."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.planning import planned
from zinfer.driver.tables import hide_secrets, new_table, plan_table
from zinfer.job.outcome import Outcome
from zinfer.plan.resolved import describe
from zinfer.units import format_bytes


def rows(*overrides: str) -> dict[str, list[str]]:
    """Map the first column to the other columns, as they are shown."""
    run = planned(*overrides)
    outcome = Outcome(
        status="planned", model=describe(run.spec, run.config), plan=run.document(), metrics={}
    )
    columns: list[Any] = [list(column.cells) for column in plan_table(outcome).columns]
    return {cells[0]: list(cells[1:]) for cells in zip(*columns, strict=True)}


def test_a_secret_is_taken_out_of_a_table_before_it_is_cut_into_lines() -> None:
    table = new_table("+tracking.tags.hub=hf_AbCd1234efgh5678", "job", "password=x")
    table.add_row("1", "https://me:Zugang-77@host/x")
    hide_secrets(table)
    shown = [table.title, *(text for each in table.columns for text in (each.header, *each.cells))]
    assert shown == ["+tracking.tags.hub=***", "job", "1", "password=***", "https://***@host/x"]


@pytest.mark.parametrize("dtype", ["float16", "int8", "int4"])
def test_the_row_of_weights_has_the_bytes_that_are_stored(dtype: str) -> None:
    overrides = ("model=opt-30b", f"dtype={dtype}", "hardware=h200", "offload=cpu")
    stored = planned(*overrides).plan.weight_stored_bytes
    assert rows(*overrides)["weights"][0] == format_bytes(stored)
    bits = {"float16": 16, "int8": 8, "int4": 4}[dtype]
    assert stored == pytest.approx(29_974_540_288 * bits / 8, rel=0.15)
