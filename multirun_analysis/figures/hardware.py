"""Figures against the hardware: measured beside the ceiling, and where the time goes."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.configuration import LATENCY, Configuration
from multirun_analysis.figures.axes import legend_below, scale
from multirun_analysis.figures.canvas import (
    COLOURS,
    LINES,
    MARKERS,
    OFFLOAD_COLOURS,
    Canvas,
    Figure,
    Panel,
)
from multirun_analysis.figures.groups import MAX_BARS, Group, circumstances
from multirun_analysis.spread import format_number
from zinfer.plan.binding import BINDING_WORDS

SHARES = (1.0, 0.5, 0.1)
"""Of the ceiling, drawn as lines."""
RESOURCE_COLOURS = {
    BINDING_WORDS["device_memory"]: OFFLOAD_COLOURS["none"],
    BINDING_WORDS["device_compute"]: COLOURS[3],
    BINDING_WORDS["host_device_link"]: OFFLOAD_COLOURS["cpu"],
    BINDING_WORDS["host_memory"]: OFFLOAD_COLOURS["cpu"],
    BINDING_WORDS["nvme"]: OFFLOAD_COLOURS["nvme"],
    BINDING_WORDS["fixed_cost"]: COLOURS[4],
}
"""What binds -> the colour that other figures give to weights kept behind it."""
LABELLED_PERCENT = 14
"""Smallest part of a bar that its seconds are written on."""


def ceiling(canvas: Canvas, found: Group) -> Figure:
    """Draw the measured decode rate against what the slowest resource allows."""
    title = "Measured against the ceiling"
    known = [
        item
        for item in found
        if item.measured
        and item.value("ceiling_decode_step_s")
        and item.value(LATENCY)
        and item.batch_size
    ]
    if len(known) == 1:
        missing = "One configuration has a ceiling; its share of it is in the table."
        return Figure(name="ceiling", title=title, caption="", missing=missing)
    if not known:
        missing = (
            "No run logged ceiling_decode_step_s, so how far these numbers are from what the "
            "hardware allows is not known. zinfer task=calibrate, once on this machine, lets every "
            "later run log it."
        )
        return Figure(name="ceiling", title=title, caption="", missing=missing)
    caption = (
        "The ceiling is the time that the slowest resource needs for the bytes and operations of a "
        f"step. {circumstances(known)}"
    )
    return Figure(name="ceiling", title=title, caption=caption, panels=(_ceiling(canvas, known),))


def _ceiling(canvas: Canvas, known: Group) -> Panel:
    axes = canvas.axes(1.15)
    points = [
        (
            (item.batch_size or 0) / (item.value("ceiling_decode_step_s") or 1),
            (item.batch_size or 0) / (item.value(LATENCY) or 1),
        )
        for item in known
    ]
    bounds = [item.binding_resource or "not said" for item in known]
    for number, resource in enumerate(sorted(set(bounds))):
        mine = [point for point, one in zip(points, bounds, strict=True) if one == resource]
        axes.plot(
            *zip(*mine, strict=True),
            MARKERS[number % len(MARKERS)],
            color=RESOURCE_COLOURS.get(resource, COLOURS[5]),
            alpha=0.75,
            label=f"bound by {resource}",
            markersize=4.5,
        )
    scale(axes, [x for x, _ in points], "x")
    scale(axes, [*(y for _, y in points), *(x for x, _ in points)])
    left, right = axes.get_xlim()
    left = max(left, right / 1e6)
    for share, style in zip(SHARES, LINES, strict=False):
        ends = [left, right], [left * share, right * share]
        axes.plot(*ends, color=COLOURS[5], linewidth=1, linestyle=style, zorder=0)
        bottom, top = axes.get_ylim()
        if bottom < right * share <= top * 1.05:
            axes.annotate(
                f"{share:.0%}",
                (right, min(right * share, top)),
                textcoords="offset points",
                xytext=(3, -3),
                fontsize=8,
            )
    axes.set_xlabel("ceiling of the decode phase (tokens/s)")
    axes.set_ylabel("measured in the decode phase (tokens/s)")
    legend_below(axes, 2)
    return canvas.panel("ceiling", axes, "Decode rate, all models")


def step_time(canvas: Canvas, chosen: Sequence[tuple[str, Configuration]]) -> Figure:
    """Draw what a generation, and a decode step, spend their time on."""
    title = "Where the time goes"
    chosen = [
        (label, item) for label, item in chosen if item.value("prefill_s") and item.value("total_s")
    ][:MAX_BARS]
    if not chosen:
        missing = "No run measured prefill_s and total_s."
        return Figure(name="time", title=title, caption="", missing=missing)
    phases = [(label, phase_seconds(item)) for label, item in chosen]
    panels = [_shares(canvas, "time-generation", "One generation", ("prefill", "decode"), phases)]
    steps = [(label, parts) for label, item in chosen if (parts := step_seconds(item))]
    note = " What a decode step is made of is not known: no run logged a ceiling."
    if steps:
        names = ("binding resource", "predicted overhead", "not explained")
        panels.append(_shares(canvas, "time-step", "One decode step", names, steps))
        note = ""
    caption = (
        "The fastest configuration of each model and place of its weights; seconds are written on "
        f"the bars.{note} {circumstances(item for _, item in chosen)}"
    )
    return Figure(name="time", title=title, caption=caption, panels=tuple(panels))


def phase_seconds(item: Configuration) -> tuple[float, ...]:
    """Return (prefill, decode) seconds of one generation."""
    prefill, total = item.value("prefill_s") or 0.0, item.value("total_s") or 0.0
    return prefill, max(0.0, total - prefill)


def step_seconds(item: Configuration) -> tuple[float, ...] | None:
    """Split a decode step: what binds, what else was predicted, the rest; or None."""
    needed, predicted, measured = (
        item.value(name) for name in ("ceiling_decode_step_s", "predicted_decode_step_s", LATENCY)
    )
    if not needed or not measured:
        return None
    middle = max(0.0, (predicted or needed) - needed)
    return (
        min(needed, measured),
        min(middle, max(0.0, measured - needed)),
        max(0.0, measured - needed - middle),
    )


def _shares(
    canvas: Canvas,
    name: str,
    title: str,
    parts: Sequence[str],
    rows: Sequence[tuple[str, Sequence[float]]],
) -> Panel:
    """Draw stacked bars of 100%, the seconds written on them."""
    axes = canvas.axes(max(0.45, 0.115 * len(rows) + 0.3))
    for index, (_, values) in enumerate(rows):
        left, total = 0.0, sum(values)
        for number, value in enumerate(values):
            share = 100 * value / total
            axes.barh(
                index,
                share,
                left=left,
                color=COLOURS[number],
                height=0.62,
                label=parts[number] if index == 0 else None,
            )
            if share > LABELLED_PERCENT:
                axes.text(
                    left + share / 2,
                    index,
                    f"{format_number(value)} s",
                    ha="center",
                    va="center",
                    fontsize=8,
                    color="white" if number != 1 else "black",
                )
            left += share
    axes.set_yticks(range(len(rows)), [label for label, _ in rows], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlim(0, 100)
    axes.set_xlabel("share of the time (%)")
    axes.grid(axis="y", visible=False)
    legend_below(axes, len(parts))
    return canvas.panel(name, axes, title)
