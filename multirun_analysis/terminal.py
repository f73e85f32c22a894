"""The report on the terminal: the table of runs, and what a reader should know of them."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from multirun_analysis.configuration import RATE
from multirun_analysis.table import Table
from zinfer.escape import printable

if TYPE_CHECKING:
    from multirun_analysis.against import Against
    from multirun_analysis.report import Report

ROWS = 40
WIDTH = 160
"""Characters of a line where the output is no terminal."""
MEASURES = (
    "decode_step_s",
    "implied_bytes_per_s",
    "ceiling_fraction",
    "stability",
    "peak_device_reserved_bytes",
    "peak_host_rss_bytes",
)
"""Shown beside status, choices and tokens/s; the rest is in the report."""


def show(report: Report) -> None:
    """Print the table of the runs, or of the plans, then the notes."""
    from rich.text import Text

    console = _console()
    console.print(Text(printable(report.title), style="bold"))
    if report.runs.rows:
        print_table(report.runs, run_columns(report.runs), console)
    plans = report.table("plans")
    if plans is not None:
        print_table(plans, plans.shown, console)
    for note in report.notes:
        console.print(Text(f"- {printable(note)}"))


def run_columns(runs: Table) -> tuple[int, ...]:
    """Choose the columns that fit a terminal: everything up to tokens/s, then MEASURES."""
    rate = next(index for index, column in enumerate(runs.columns) if column.key == RATE)
    wanted = [index for index in runs.shown if index <= rate or runs.columns[index].key in MEASURES]
    return tuple(wanted)


def show_against(found: Against, table: Table, allowed: float) -> None:
    """Print the pairs, the predictions that changed, and what is slower than allowed."""
    from rich.text import Text

    console = _console()
    console.print(Text(printable(table.title), style="bold"))
    print_table(table, table.shown, console)
    for sentence in found.changes:
        console.print(Text(f"- prediction changed: {printable(sentence)}"))
    if not found.changes and found.pairs:
        console.print(Text("- no prediction changed"))
    failed = found.failed(allowed)
    beyond = f" by more than {allowed:.0%} and" if allowed else ""
    said = (
        f"{len(failed)} of {len(found.pairs)} configurations are slower{beyond} beyond their error"
    )
    for note in (*found.notes, f"{said}, or no longer run" if failed else f"none of them: {said}"):
        console.print(Text(f"- {printable(note)}"))


def print_table(table: Table, indices: tuple[int, ...], console: Any) -> None:
    """Print these columns, numbers met at the decimal point; rows beyond ROWS are counted."""
    from rich.table import Table as Grid
    from rich.text import Text

    grid = Grid(box=None, pad_edge=False, header_style="bold")
    for index in indices:
        column = table.columns[index]
        grid.add_column(
            Text(printable(column.head)),
            justify="right" if column.number else "left",
            no_wrap=column.number,
        )
    for row in table.rows[:ROWS]:
        grid.add_row(*(Text(printable(table.aligned(row, index))) for index in indices))
    console.print(grid)
    if len(table.rows) > ROWS:
        console.print(f"... and {len(table.rows) - ROWS} more in the report")


def _console() -> Any:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else WIDTH)
