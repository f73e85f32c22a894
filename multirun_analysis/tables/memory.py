"""The table of memory: planned beside measured, for each tier."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.compare import differing_choices
from multirun_analysis.configuration import Configuration
from multirun_analysis.table import Table
from multirun_analysis.tables.choices import choice_cell, choice_columns, known, metric
from zinfer.units import GIB

TIERS = (
    ("device", "plan_device_needed_bytes", "peak_device_reserved_bytes"),
    ("host", "plan_host_needed_bytes", "peak_host_rss_bytes"),
    ("pinned", "plan_pinned_needed_bytes", "mlocked_bytes"),
)
"""Name, planned and measured metric of a tier."""
MEASURES = (
    *(
        metric(name, f"{tier} {word}", "GiB", scale=GIB, optional=tier == "pinned")
        for tier, plan, peak in TIERS
        for name, word in ((plan, "planned"), (peak, "measured"))
    ),
    metric("plan_disk_needed_bytes", "disk planned", "GiB", scale=GIB, optional=True),
)


def memory_table(found: Sequence[Configuration]) -> Table:
    """Build one row for each configuration that has both a plan and a measurement."""
    rows_of = [
        item
        for item in found
        if item.ok_runs and any(item.value(plan) is not None for _, plan, _ in TIERS)
    ]
    choices = differing_choices(found)
    measures = known(MEASURES, rows_of)
    columns = (*choice_columns(choices), *(column for column, _ in measures))
    rows = tuple(
        (
            *(choice_cell(item, choice) for choice in choices),
            *(cell(item) for _, cell in measures),
        )
        for item in rows_of
    )
    note = (
        "GiB. Planned before anything was allocated; measured at its highest. On a machine without "
        "a GPU the device is host memory."
    )
    return Table(
        name="memory",
        title="Memory per tier, planned and measured",
        note=note,
        columns=columns,
        rows=rows,
    )
