"""The table of bytes that a run moves: over the disk, the link and the memories."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.command import DRIVE_WRITES_TB
from multirun_analysis.compare import differing_choices
from multirun_analysis.configuration import Configuration
from multirun_analysis.spread import format_number
from multirun_analysis.table import Table, number_cell
from multirun_analysis.tables.choices import Measure, choice_cell, choice_columns, known, metric

MB, GB, TB = 1e6, 1e9, 1e12
PLACES = (("nvme", "disk"), ("link", "link"), ("host_memory", "host"), ("device_memory", "device"))
"""Name in metrics, and what a column calls it."""
MEASURES: tuple[Measure, ...] = (
    *(
        metric(
            f"predicted_{name}_bytes_per_token",
            f"{words} MB/token planned",
            "What the plan expects a decode step to move, over its rows",
            scale=MB,
            optional=True,
        )
        for name, words in PLACES
    ),
    metric(
        "nvme_read_bytes_per_token",
        "disk MB/token read",
        "Counted by the kernel, over all new tokens; what the page cache served is not in it",
        scale=MB,
        optional=True,
    ),
    *(
        metric(
            f"effective_{name}_bytes_per_s",
            f"{words} GB/s",
            "Bytes of a token times decoded tokens/s; on the disk those read, else those planned",
            scale=GB,
            optional=True,
        )
        for name, words in PLACES
    ),
    metric(
        "nvme_read_bytes",
        "disk GB read",
        "Counted by the kernel, over all generations of the run, warm-up included",
        scale=GB,
        optional=True,
    ),
    metric(
        "plan_disk_needed_bytes",
        "disk GB written planned",
        "Size of the swap files; loading may write them twice",
        scale=GB,
        optional=True,
    ),
    metric(
        "nvme_written_bytes",
        "disk GB written",
        "By the whole run, counted by the kernel",
        scale=GB,
        optional=True,
    ),
    metric(
        "nvme_written_bytes_per_token",
        "disk MB/token written",
        "Those bytes over all new tokens: a longer run writes less for each",
        scale=MB,
        optional=True,
    ),
)
OF_THE_DISK = frozenset({
    "nvme_read_bytes_per_token", "nvme_read_bytes", "plan_disk_needed_bytes",
    "nvme_written_bytes", "nvme_written_bytes_per_token",
})  # fmt: skip
"""Numbers that other runs have too: they read their own program, and write their log."""
MOVES = (
    *(f"effective_{name}_bytes_per_s" for name, _ in PLACES),
    "nvme_read_bytes_per_token",
)
"""A configuration has a row where it has one of them."""


def traffic_table(
    found: Sequence[Configuration], drive_writes_tb: float = DRIVE_WRITES_TB
) -> Table:
    """Build one row for each measured configuration whose bytes are known.

    Args:
        drive_writes_tb: terabytes of writes that a drive is rated for.
    """
    rows_of = [
        item
        for item in found
        if item.ok_runs and any(item.value(name) is not None for name in MOVES)
    ]
    choices = differing_choices(found)
    measures = known([swapping_only(measure) for measure in MEASURES], rows_of)
    columns = (*choice_columns(choices), *(column for column, _ in measures))
    rows = tuple(
        (
            *(choice_cell(item, choice) for choice in choices),
            *(cell(item) for _, cell in measures),
        )
        for item in rows_of
    )
    note = (
        "Decimal units. A pass serves all rows of the batch, so a token costs less in a larger "
        f"one.{endurance(rows_of, drive_writes_tb)}"
    )
    return Table(
        name="traffic",
        title="Bytes moved, planned and measured",
        note=note,
        columns=columns,
        rows=rows,
    )


def swapping_only(measure: Measure) -> Measure:
    """Leave the disk's numbers empty for runs that keep no weights there."""
    column, cell = measure
    if column.key not in OF_THE_DISK:
        return measure
    return column, lambda item: cell(item) if item.offload == "nvme" else number_cell(None)


def endurance(found: Sequence[Configuration], drive_writes_tb: float) -> str:
    """Say what the run that writes most means for a drive; nothing where no run swaps to one."""
    written = max(
        (item.value("nvme_written_bytes") or 0 for item in found if item.offload == "nvme"),
        default=0,
    )
    if not written:
        return ""
    runs = drive_writes_tb * TB / written
    return (
        f" One run writes up to {format_number(written / GB)} GB while it loads: "
        f"{format_number(100 / runs, 2)} % of what a drive rated for {drive_writes_tb:g} TB of "
        f"writes endures, so that takes {format_number(runs, 2)} such runs (--drive-tbw sets your "
        "drive's). Generating only reads, which wears no drive."
    )
