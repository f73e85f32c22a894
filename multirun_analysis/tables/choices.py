"""Columns that all tables share: what was chosen, and single metrics."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from multirun_analysis.configuration import Configuration
from multirun_analysis.labels import LABELS, NUMBERS
from multirun_analysis.table import Cell, Column, number_cell

Measure = tuple[Column, Callable[[Configuration], Cell]]
"""A column, and how a configuration fills it."""


def choice_cell(item: Configuration, choice: str) -> Cell:
    """Make a cell of a choice that sorts numbers as numbers."""
    value, number = item.chosen(choice), item.number(choice)
    return Cell(text=value, value=number if number is not None else None if value == "-" else value)


def choice_columns(choices: Sequence[str]) -> tuple[Column, ...]:
    """Return one column for each choice, under its label."""
    return tuple(
        Column(key=choice, head=LABELS.get(choice, choice), number=choice in NUMBERS)
        for choice in choices
    )


def metric(
    key: str,
    head: str,
    help_: str,
    *,
    scale: float = 1.0,
    digits: int = 3,
    screen_only: bool = False,
    optional: bool = False,
) -> Measure:
    """Return a metric in the unit that `scale` makes of it."""
    column = Column(
        key=key, head=head, number=True, help=help_, screen_only=screen_only, optional=optional
    )
    return column, lambda item: number_cell(item.value(key), scale, digits)


def known(measures: Sequence[Measure], found: Sequence[Configuration]) -> list[Measure]:
    """Keep the measures that at least one configuration has."""
    return [
        measure for measure in measures if any(measure[1](item).value is not None for item in found)
    ]


def same_everywhere(same: Mapping[str, str]) -> str:
    """Say what is ' The same everywhere: prompt 512, new 32.', or nothing."""
    if not same:
        return ""
    parts = ", ".join(f"{LABELS[name]} {value}" for name, value in same.items())
    return f" The same everywhere: {parts}."
