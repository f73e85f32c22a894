"""A table: columns and cells, each with its text for people and its value for machines."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from multirun_analysis.spread import Spread, format_number, format_spread, scaled

WHOLE_PART = re.compile(r"[-<]?[\d,]+")


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; `key` is its name in CSV, with the unit, `head` what people read."""

    key: str
    head: str
    number: bool = False
    csv_only: bool = False
    screen_only: bool = False
    """In the report and in CSV, and not in a paper's table: ids, commits, details."""
    optional: bool = False
    """Left out of a paper's table that would be wider than the page, the last one first."""
    help: str | None = None
    """What the number is, shown when the head is pointed at."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value: as text, and as it sorts and goes into CSV (None: unknown)."""

    text: str
    value: float | str | None = None
    url: str | None = None
    kind: str | None = None
    """For the report's style: a status, a standing, a verdict."""

    @property
    def whole(self) -> str:
        """Text before the decimal point of its first number; all of it where there is none."""
        found = WHOLE_PART.match(self.text)
        return found.group() if found else self.text

    @property
    def fraction(self) -> str:
        """Return the rest: decimal point, decimals, and what follows them."""
        return self.text[len(self.whole) :]


@dataclass(frozen=True, kw_only=True, eq=False)
class Table:
    """A table with its caption."""

    name: str
    """File name without suffix."""
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """Indices of the columns that people see."""
        return tuple(index for index, column in enumerate(self.columns) if not column.csv_only)

    @property
    def printed(self) -> tuple[int, ...]:
        """Indices of the columns of a paper's table."""
        return tuple(index for index in self.shown if not self.columns[index].screen_only)

    @cached_property
    def fraction_widths(self) -> tuple[int, ...]:
        """For each column of numbers, count the most characters behind the whole part."""
        return tuple(
            max((len(row[index].fraction) for row in self.rows), default=0) if column.number else 0
            for index, column in enumerate(self.columns)
        )

    def aligned(self, row: Sequence[Cell], index: int) -> str:
        """Fill up the cell's text so that right-aligned numbers meet at the decimal point."""
        missing = self.fraction_widths[index] - len(row[index].fraction)
        return row[index].text + " " * missing * self.columns[index].number


def text_cell(text: object, kind: str | None = None, url: str | None = None) -> Cell:
    """Make a cell of text that sorts as itself; '-' for None."""
    return Cell(
        text="-" if text is None else str(text),
        value=None if text is None else str(text),
        kind=kind,
        url=url,
    )


def number_cell(value: float | None, scale: float = 1.0, digits: int = 3) -> Cell:
    """Make a cell of a number; `scale` divides what people see, CSV keeps the metric's unit."""
    return Cell(text=format_number(None if value is None else value / scale, digits), value=value)


def whole_cell(value: int | None) -> Cell:
    """Make a cell of a count."""
    return Cell(text="-" if value is None else str(value), value=value)


def spread_cells(spread: Spread | None, scale: float = 1.0) -> tuple[Cell, Cell, Cell]:
    """Make cells: median ± deviation for people; median, deviation and count for CSV."""
    shown = None if spread is None else scaled(spread, 1 / scale)
    median = Cell(text=format_spread(shown), value=spread.median if spread else None)
    return (
        median,
        Cell(text="", value=spread.stddev if spread else None),
        Cell(text=str(spread.count) if spread else "-", value=spread.count if spread else None),
    )


def spread_columns(key: str, head: str, help_: str) -> tuple[Column, Column, Column]:
    """Return the columns of `spread_cells`."""
    return (
        Column(key=key, head=head, number=True, help=help_),
        Column(key=f"{key}_stddev", head="", number=True, csv_only=True),
        Column(
            key=f"{key}_values",
            head="n",
            number=True,
            screen_only=True,
            help="Timed generations behind the number, over all reruns",
        ),
    )
