"""Figures that people choose by: tokens/s against latency, memory and quality, with the front."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multirun_analysis.best import pareto_front
from multirun_analysis.configuration import LATENCY, Configuration
from multirun_analysis.figures.axes import legend_below, scale
from multirun_analysis.figures.canvas import COLOURS, MARKERS, Canvas, Figure, Panel
from multirun_analysis.figures.groups import (
    MAX_PANELS,
    Group,
    Named,
    circumstances,
    colour_of,
    everything,
    left_out,
    series,
    series_name,
    series_names,
    series_of,
    styles_of,
)
from zinfer.units import GIB

Cost = Callable[[Configuration], float | None]
"""What a configuration costs, less is better; None where that was not measured."""
FRONT = "No configuration beats those in a ring in both."
FRONT_SIZE = 10
"""Points across the ring around a configuration of the Pareto front."""


def latency_tradeoff(canvas: Canvas, groups: Sequence[Named]) -> Figure:
    """Draw tokens/s against the time of a decode step."""
    return _figure(
        canvas,
        groups,
        name="pareto",
        title="Throughput against latency",
        label="time of one decode step (s)",
        cost=lambda item: item.value(LATENCY),
        missing="No two runs measured decode_step_s under the same circumstances.",
    )


def memory_bytes(item: Configuration) -> float | None:
    """Return the bytes of the memory that limits it: the device's, or without one the host's."""
    device = item.value("peak_device_reserved_bytes")
    return device if device else item.value("peak_host_rss_bytes")


def memory_tradeoff(canvas: Canvas, groups: Sequence[Named]) -> Figure:
    """Draw tokens/s against the memory that was needed at most."""
    on_device = any(item.value("peak_device_reserved_bytes") for item in everything(groups))
    return _figure(
        canvas,
        groups,
        name="tradeoff",
        title="Throughput against memory",
        label=f"peak {'device' if on_device else 'host'} memory (GiB)",
        cost=lambda item: None if (used := memory_bytes(item)) is None else used / GIB,
        missing="No two runs logged a peak of memory under the same circumstances.",
    )


def quality_tradeoff(canvas: Canvas, groups: Sequence[Named]) -> Figure:
    """Draw tokens/s against perplexity."""
    return _figure(
        canvas,
        groups,
        name="quality-tradeoff",
        title="Throughput against quality",
        label="perplexity (lower is better)",
        cost=lambda item: item.value("quality_perplexity"),
        missing="No two runs logged quality_perplexity: what speed costs in quality is unknown.",
    )


def _figure(
    canvas: Canvas,
    groups: Sequence[Named],
    *,
    name: str,
    title: str,
    label: str,
    cost: Cost,
    missing: str,
) -> Figure:
    """Draw a panel for each group in which two configurations have a cost and a speed."""
    known = [
        (group_label, [item for item in group if item.measured and cost(item)])
        for group_label, group in groups
    ]
    known = [(group_label, group) for group_label, group in known if len(group) > 1]
    if not known:
        return Figure(name=name, title=title, caption="", missing=missing)
    panels = tuple(
        _panel(canvas, f"{name}-{group_label}", group_label, group, label, cost)
        for group_label, group in known[:MAX_PANELS]
    )
    more = left_out(known, MAX_PANELS, "models")
    caption = (
        f"Each point is a configuration; up and to the left is better. {FRONT}{more} "
        f"{circumstances(everything(known))}"
    )
    return Figure(name=name, title=title, caption=caption, panels=panels)


def _panel(canvas: Canvas, name: str, title: str, group: Group, label: str, cost: Cost) -> Panel:
    axes = canvas.axes(1.1)
    names = series_names(group)
    for key, style in styles_of(series_of(group, names)).items():
        mine = [item for item in group if series(item, names) == key]
        axes.plot(
            [cost(item) for item in mine],
            [item.rate for item in mine],
            MARKERS[style % len(MARKERS)],
            color=colour_of(key[0]),
            alpha=0.85,
            label=series_name(key),
        )
    points = [(cost(item) or 0.0, item.rate) for item in group]
    front = pareto_front(points)
    axes.step(
        *zip(*front, strict=True),
        where="post",
        color=COLOURS[5],
        linewidth=1.1,
        zorder=0,
    )
    axes.plot(
        *zip(*front, strict=True),
        "o",
        markersize=FRONT_SIZE,
        markerfacecolor="none",
        markeredgecolor=COLOURS[5],
        zorder=0,
        label="Pareto front",
    )
    scale(axes, [x for x, _ in points], "x")
    scale(axes, [y for _, y in points])
    axes.set_xlabel(label)
    axes.set_ylabel("generated tokens/s")
    legend_below(axes, 3)
    return canvas.panel(name, axes, title)
