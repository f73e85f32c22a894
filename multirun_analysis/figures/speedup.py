"""Figure: speed-ups as a matrix, one for each model."""

from __future__ import annotations

from collections.abc import Sequence
from math import log2
from typing import Any

from multirun_analysis.compare import differing_choices, same_circumstances
from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.canvas import Canvas, Figure, Panel, short
from multirun_analysis.figures.groups import MAX_BARS, MAX_PANELS, circumstances
from multirun_analysis.labels import LABELS
from multirun_analysis.ratios import Baseline, Ratio
from multirun_analysis.spread import Spread, format_number

RowKey = tuple[tuple[int, str], ...]


def speedup(canvas: Canvas, ratios: Sequence[Ratio], baseline: Baseline | None) -> Figure:
    """Draw rows for what else was chosen, and columns for the values of the baseline's choice."""
    title = f"Speed-up over {baseline}" if baseline else "Speed-up"
    known = [item for item in ratios if item.ratio is not None]
    others = [item for item in known if item.reference is not item.candidate]
    if baseline is None or not others:
        missing = (
            "Nothing varies that a speed-up could be asked against."
            if baseline is None
            else f"No measured run has {baseline} and an equal to compare."
        )
        return Figure(name="speedup", title=title, caption="", missing=missing)
    groups = same_circumstances([item.candidate for item in known])
    panels = tuple(
        _matrix(canvas, label, [item for item in known if item.candidate in group], baseline)
        for label, group in groups[:MAX_PANELS]
    )
    caption = (
        f"Generated tokens/s over those of {baseline} with all else equal, ± first-order error of "
        "the quotient; 1 is the baseline. In brackets: the error does not tell it from 1. "
        f"{circumstances(item.candidate for item in known)}"
    )
    return Figure(name="speedup", title=title, caption=caption, panels=panels)


def _matrix(canvas: Canvas, label: str, known: Sequence[Ratio], baseline: Baseline) -> Panel:
    others = [
        name
        for name in differing_choices([item.candidate for item in known])
        if name not in (baseline.name, "model.name")
    ]
    rows = sorted({_row_key(item.candidate, others) for item in known})[: 2 * MAX_BARS]
    columns = sorted(
        {item.candidate.chosen(baseline.name) for item in known},
        key=lambda value: (value != baseline.value, value.zfill(9)),
    )
    best: dict[tuple[int, int], Ratio] = {}
    for item in known:
        key = _row_key(item.candidate, others)
        if key in rows:
            cell = rows.index(key), columns.index(item.candidate.chosen(baseline.name))
            best[cell] = max(item, best.get(cell, item), key=_median)
    axes = canvas.axes(max(0.45, 0.085 * len(rows) + 0.3))
    for (row, number), item in best.items():
        assert item.ratio is not None
        _cell(axes, row, number, item.ratio)
    axes.set_xlim(-0.5, len(columns) - 0.5)
    axes.set_ylim(len(rows) - 0.5, -0.5)
    axes.set_xticks(range(len(columns)), [short(value) for value in columns])
    names = [short(", ".join(value for _, value in row)) or "all" for row in rows]
    axes.set_yticks(range(len(rows)), names, fontsize=8)
    axes.set_xlabel(baseline.name)
    axes.set_ylabel(", ".join(LABELS.get(name, name) for name in others))
    axes.grid(visible=False)
    return canvas.panel(f"speedup-{label}", axes, label)


def _cell(axes: Any, row: int, number: int, ratio: Spread) -> None:
    """Colour a cell by the logarithm of its ratio, and write the ratio into it."""
    import matplotlib

    strength = max(-1.0, min(1.0, log2(ratio.median) / 4)) if ratio.median > 0 else -1.0
    colour = matplotlib.colormaps["PuOr_r"](0.5 + 0.45 * strength)
    axes.add_patch(
        matplotlib.patches.Rectangle(
            (number - 0.5, row - 0.5), 1, 1, facecolor=colour, edgecolor="white", linewidth=1
        )
    )
    error = f" ± {format_number(ratio.stddev, 1)}" if ratio.stddev else ""
    text = f"{format_number(ratio.median)}{error}"
    axes.text(
        number,
        row,
        f"({text})" if ratio.around_one else text,
        ha="center",
        va="center",
        fontsize=8,
        color="white" if abs(strength) > 0.7 else "black",
    )


def _median(item: Ratio) -> float:
    return item.ratio.median if item.ratio else 0.0


def _row_key(item: Configuration, names: Sequence[str]) -> RowKey:
    """Sort batches as numbers."""
    values = (item.chosen(name) for name in names)
    return tuple((int(value) if value.isdecimal() else 0, value) for value in values)
