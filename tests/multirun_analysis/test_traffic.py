"""The table of bytes moved: planned beside measured, and what the writes mean for a drive."""

from __future__ import annotations

from dataclasses import replace

from multirun_analysis.compare import configurations
from multirun_analysis.runs import Run
from multirun_analysis.table import Table
from multirun_analysis.tables.traffic import traffic_table
from tests.helpers.invented_runs import run

NVME = {
    "predicted_nvme_bytes_per_token": 7.5e9,
    "nvme_read_bytes_per_token": 7.6e9,
    "nvme_read_bytes": 760e9,
    "nvme_written_bytes_per_token": 0.6e9,
    "effective_nvme_bytes_per_s": 3.0e9,
    "effective_link_bytes_per_s": 2.9e9,
    "plan_disk_needed_bytes": 60e9,
    "nvme_written_bytes": 60e9,
}


def moving(offload: str, **numbers: float) -> Run:
    """Invent a measured run that moved these bytes."""
    plain = run(2.0, offload_device=offload)
    return replace(plain, run_id=offload, metrics={**plain.metrics, **numbers})


def table_of(*runs: Run) -> Table:
    return traffic_table(configurations(runs))


def shown(table: Table, key: str) -> list[str]:
    """Return the texts of one column."""
    index = [column.key for column in table.columns].index(key)
    return [row[index].text for row in table.rows]


def test_planned_stands_beside_measured_and_the_unknown_is_a_dash() -> None:
    table = table_of(moving("nvme", **NVME), moving("cpu", effective_link_bytes_per_s=12e9))
    assert shown(table, "offload.device") == ["nvme", "cpu"]
    assert shown(table, "predicted_nvme_bytes_per_token") == ["7,500", "-"]
    assert shown(table, "nvme_read_bytes_per_token") == ["7,600", "-"]
    assert shown(table, "effective_link_bytes_per_s") == ["2.90", "12.0"]
    assert shown(table, "nvme_read_bytes") == ["760", "-"]
    assert shown(table, "nvme_written_bytes") == ["60.0", "-"]
    assert shown(table, "nvme_written_bytes_per_token") == ["600", "-"]


def test_the_note_says_how_many_runs_a_drive_is_rated_for() -> None:
    assert "One run writes up to 60.0 GB" in table_of(moving("nvme", **NVME)).note
    note = table_of(moving("nvme", **NVME)).note
    assert "0.010 % of what a drive rated for 600 TB" in note and "takes 10,000 such runs" in note
    enduring = traffic_table(configurations([moving("nvme", **NVME)]), 1200)
    assert "rated for 1200 TB of writes endures, so that takes 20,000 such runs" in enduring.note
    log = table_of(moving("cpu", nvme_written_bytes=4096, effective_link_bytes_per_s=1e9))
    assert "rated" not in log.note, "a run without swap wears no drive"
    assert "nvme_written_bytes" not in [column.key for column in log.columns]


def test_runs_that_know_no_bytes_have_no_row() -> None:
    assert table_of(run(2.0)).rows == ()
