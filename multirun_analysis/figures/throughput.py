"""Figure: tokens/s over batch size, as lines; of a single batch, as bars."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from multirun_analysis.compare import varied
from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.axes import legend_below, powers_of_two, scale
from multirun_analysis.figures.canvas import (
    INK,
    LINES,
    MARKERS,
    Canvas,
    Figure,
    Panel,
    in_two_lines,
)
from multirun_analysis.figures.groups import (
    MAX_BARS,
    MAX_PANELS,
    Group,
    Named,
    Series,
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
from multirun_analysis.labels import WEIGHTS_ON
from multirun_analysis.spread import format_spread

CAPTION = (
    "Generated tokens/s, median ± standard deviation. Where other choices vary too, the line joins "
    "the fastest and faint points are the others. A cross at the bottom: that batch failed or does "
    "not fit."
)
MAX_LINES = 6
BARS_CAPTION = "Generated tokens/s, median ± standard deviation."
REACH = 1.25
"""Where the mark of a deviation ends at most, over the fastest bar: the number stands behind it."""
ROOM = 1.3
"""Width of the frame over the end of the longest mark."""


def throughput(canvas: Canvas, groups: Sequence[Named]) -> Figure:
    """Draw a panel for each group: over its batches, or one bar for each configuration."""
    if not groups:
        missing = "No run measured generated_tokens_per_s."
        return Figure(name="throughput", title="Throughput", caption="", missing=missing)
    single = [_is_single(group) for _, group in groups]
    panels = tuple(
        (_bars if _is_single(group) else _lines)(canvas, label, group)
        for label, group in groups[:MAX_PANELS]
    )
    caption = BARS_CAPTION if all(single) else CAPTION
    more = left_out(groups, MAX_PANELS, "models")
    return Figure(
        name="throughput",
        title="Throughput" if all(single) else "Throughput over batch size",
        caption=f"{caption}{more} {circumstances(everything(groups))}",
        panels=panels,
    )


def _is_single(group: Group) -> bool:
    """Tell if one batch was measured: a line over batches would be a column of points."""
    return len({item.batch_size for item in group if item.measured}) <= 1


def _bars(canvas: Canvas, label: str, group: Group) -> Panel:
    measured = sorted((item for item in group if item.measured), key=lambda item: -item.rate)
    shown = measured[:MAX_BARS]
    names = [name for name in varied(shown) if name != "model.name"] or ["offload.device"]
    axes = canvas.axes(max(0.37, 0.09 * len(shown) + 0.28))
    reach = REACH * max(item.rate for item in shown)
    ends = []
    for index, item in enumerate(shown):
        spread = item.rate_spread
        assert spread is not None
        deviation = spread.stddev or 0.0
        ends.append(min(reach, spread.median + deviation))
        axes.barh(
            index,
            spread.median,
            xerr=[[min(deviation, spread.median)], [ends[-1] - spread.median]],
            height=0.62,
            color=colour_of(item.offload),
            error_kw={"elinewidth": 1.2, "capsize": 3, "ecolor": INK},
        )
        axes.annotate(
            f" {format_spread(spread)}",
            (ends[-1], index),
            va="center",
            fontsize=8.5,
            xytext=(3, 0),
            textcoords="offset points",
        )
    axes.set_yticks(range(len(shown)), [in_two_lines(_bar_name(item, names)) for item in shown])
    axes.invert_yaxis()
    axes.set_xlim(0, ROOM * max(ends))
    axes.set_xlabel(f"generated tokens/s{_batch_of(shown)}")
    axes.grid(axis="y", visible=False)
    return canvas.panel(f"throughput-{label}", axes, label)


def _batch_of(shown: Group) -> str:
    batch = shown[0].batch_size
    return f" at batch {batch}" if batch else ""


def _bar_name(item: Configuration, names: Sequence[str]) -> str:
    parts = []
    for name in names:
        value = item.chosen(name)
        if name not in item.choices:
            continue
        parts.append(WEIGHTS_ON.get(value, value) if name == "offload.device" else value)
    return ", ".join(parts)


def _lines(canvas: Canvas, label: str, group: Group) -> Panel:
    axes = canvas.axes(1.1)
    names, crosses = series_names(group, MAX_LINES), 0
    for key, style in styles_of(series_of(group, names)).items():
        mine = [item for item in group if series(item, names) == key and item.batch_size]
        fastest = _fastest_by_batch(mine)
        _line(axes, fastest, mine, key, style)
        failed = {item.batch_size or 0 for item in mine if item.failed_runs and not item.ok_runs}
        if failed - set(fastest):
            axes.plot(
                sorted(failed - set(fastest)),
                [0.02 + 0.03 * crosses] * len(failed - set(fastest)),
                "x",
                color=colour_of(key[0]),
                transform=axes.get_xaxis_transform(),
                markersize=4,
                alpha=0.8,
            )
            crosses += 1
    powers_of_two(axes, [item.batch_size for item in group if item.batch_size])
    scale(axes, [item.rate for item in group])
    axes.set_xlabel("batch size (sequences)")
    axes.set_ylabel("generated tokens/s")
    legend_below(axes, 3)
    return canvas.panel(f"throughput-{label}", axes, label)


def _fastest_by_batch(found: Group) -> dict[int, Configuration]:
    """Map each batch to its fastest measured configuration."""
    fastest: dict[int, Configuration] = {}
    for item in sorted((item for item in found if item.measured), key=lambda item: item.rate):
        fastest[item.batch_size or 0] = item
    return fastest


def _line(
    axes: Any, fastest: dict[int, Configuration], mine: Group, key: Series, style: int
) -> None:
    """Join the fastest of each batch, with the others as faint points."""
    others = [item for item in mine if item.measured and item not in fastest.values()]
    colour = colour_of(key[0])
    points = [[item.batch_size for item in others], [item.rate for item in others]]
    axes.plot(*points, ".", color=colour, alpha=0.35)
    if not fastest:
        return
    batches = sorted(fastest)
    spreads = [spread for batch in batches if (spread := fastest[batch].rate_spread) is not None]
    axes.errorbar(
        batches,
        [spread.median for spread in spreads],
        yerr=[spread.stddev or 0.0 for spread in spreads],
        color=colour,
        capsize=2,
        marker=MARKERS[style % len(MARKERS)],
        linestyle=LINES[style % len(LINES)],
        label=series_name(key),
    )
