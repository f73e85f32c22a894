"""Figure: memory per tier, what was planned beside what was used."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.axes import legend_below
from multirun_analysis.figures.canvas import COLOURS, Canvas, Figure, Panel
from multirun_analysis.figures.groups import MAX_BARS, circumstances
from multirun_analysis.spread import format_number
from multirun_analysis.tables.memory import TIERS
from zinfer.units import GIB

MARKED_WITHIN = 1.7
"""The mark of what is available is drawn up to this multiple of the longest bar; beyond, it is
only written: it would crush the bars."""


def memory(canvas: Canvas, chosen: Sequence[tuple[str, Configuration]]) -> Figure:
    """Draw a panel for each tier that was both planned and measured."""
    title = "Memory per tier, planned beside measured"
    panels = tuple(
        _panel(canvas, tier, plan, peak, rows)
        for tier, plan, peak in TIERS
        if (
            rows := [
                (label, item)
                for label, item in chosen
                if item.value(plan) and item.value(peak) is not None
            ][:MAX_BARS]
        )
    )
    if not panels:
        missing = "No run has both a memory plan and a measured peak."
        return Figure(name="memory", title=title, caption="", missing=missing)
    caption = (
        "The fastest configuration of each model and place of its weights; behind the bars, what "
        f"was available. {circumstances(item for _, item in chosen)}"
    )
    return Figure(name="memory", title=title, caption=caption, panels=panels)


def _panel(
    canvas: Canvas,
    tier: str,
    plan: str,
    peak: str,
    rows: Sequence[tuple[str, Configuration]],
) -> Panel:
    axes = canvas.axes(max(0.45, 0.115 * len(rows) + 0.3))
    longest = max(max(_gib(item, plan), _gib(item, peak)) for _, item in rows)
    for index, (_, item) in enumerate(rows):
        for place, metric, colour, label in (
            (-0.19, plan, COLOURS[4], "planned"),
            (0.19, peak, COLOURS[0], "measured peak"),
        ):
            name = label if index == 0 else None
            width = _gib(item, metric)
            axes.barh(index + place, width, height=0.36, color=colour, label=name)
        _available(axes, index, item, (plan, peak), longest)
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, max(axes.get_xlim()[1], longest * 1.22))
    axes.set_xlabel(f"{tier} memory (GiB)")
    axes.grid(axis="y", visible=False)
    legend_below(axes, 3)
    return canvas.panel(f"memory-{tier}", axes, tier.capitalize())


def _available(
    axes: Any, index: int, item: Configuration, metrics: tuple[str, str], longest: float
) -> None:
    """Write what was available behind the bars, and mark it where it is near."""
    plan, peak = metrics
    limit = _gib(item, plan.replace("needed", "available"))
    if not limit:
        return
    if limit <= longest * MARKED_WITHIN:
        ends = [limit] * 2, [index - 0.4, index + 0.4]
        axes.plot(*ends, color=COLOURS[5], linewidth=1.6)
    end = max(_gib(item, plan), _gib(item, peak))
    if limit <= longest * MARKED_WITHIN and limit > end and limit - end < 0.25 * longest:
        end = limit
    axes.annotate(
        f"of {format_number(limit)}",
        (end, index),
        va="center",
        fontsize=7.5,
        color=COLOURS[5],
        xytext=(4, 0),
        textcoords="offset points",
    )


def _gib(item: Configuration, metric: str) -> float:
    return (item.value(metric) or 0.0) / GIB
