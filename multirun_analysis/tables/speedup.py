"""The table of speed-ups: one column for each value of the baseline's choice."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.compare import differing_choices
from multirun_analysis.labels import LABELS
from multirun_analysis.ratios import Baseline, Ratio
from multirun_analysis.spread import Spread, format_spread
from multirun_analysis.table import Cell, Column, Table
from multirun_analysis.tables.choices import choice_cell, choice_columns

WITHIN = "(within spread)"
"""Said of a ratio that its own error does not tell from 1."""


def speedup_table(ratios: Sequence[Ratio], baseline: Baseline) -> Table:
    """Build a matrix: a row for each configuration without the baseline's choice."""
    others = [
        choice
        for choice in differing_choices([item.candidate for item in ratios])
        if choice != baseline.name
    ]
    values = sorted(
        {item.candidate.chosen(baseline.name) for item in ratios},
        key=lambda value: (value != baseline.value, _sortable(value)),
    )
    rows: dict[tuple[object, ...], dict[str, Ratio]] = {}
    for item in ratios:
        key = (
            item.candidate.context,
            *(choice_cell(item.candidate, choice).value for choice in others),
        )
        kept = rows.setdefault(key, {})
        value = item.candidate.chosen(baseline.name)
        if value not in kept or _median(item.ratio) > _median(kept[value].ratio):
            kept[value] = item
    columns = (
        *choice_columns(others),
        *(column for value in values for column in _columns(baseline, value)),
    )
    filled = []
    for kept in rows.values():
        any_item = next(iter(kept.values())).candidate
        cells = [choice_cell(any_item, choice) for choice in others]
        for value in values:
            cells += _cells(kept.get(value))
        filled.append(tuple(cells))
    return Table(
        name="speedup",
        title=f"Speed-up over {baseline}",
        note="Ratio of generated tokens/s ± first-order error, all else equal. Within spread: the "
        "error does not tell the ratio from 1. A dash has no baseline that was measured.",
        columns=columns,
        rows=tuple(filled),
    )


def _columns(baseline: Baseline, value: str) -> tuple[Column, ...]:
    key = f"{baseline.name}={value}"
    head = f"{LABELS.get(baseline.name, baseline.name)} {value}"
    return (
        Column(key=key, head=head, number=True),
        Column(key=f"{key}_stddev", head="", number=True, csv_only=True),
        Column(key=f"{key}_within_spread", head="", csv_only=True),
    )


def _cells(item: Ratio | None) -> tuple[Cell, ...]:
    if item is None or item.ratio is None:
        text = "-" if item is None else f"- ({item.missing})"
        return Cell(text=text), Cell(text=""), Cell(text="")
    ratio = item.ratio
    known = ratio.stddev is not None
    return (
        ratio_cell(ratio),
        Cell(text="", value=ratio.stddev),
        Cell(text="", value=str(ratio.around_one).lower() if known else None),
    )


def ratio_cell(ratio: Spread) -> Cell:
    """Show a ratio with its error: '1.02 ± 0.05 (within spread)'."""
    within = f" {WITHIN}" if ratio.around_one else ""
    kind = "within" if ratio.around_one else None
    return Cell(text=format_spread(ratio) + within, value=ratio.median, kind=kind)


def _sortable(value: str) -> tuple[float, str]:
    return (float(value) if value.isdecimal() else float("inf"), value)


def _median(spread: Spread | None) -> float:
    return spread.median if spread else -1.0
