"""Figure: the time of each decode step, which grows with the KV cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.axes import legend_below, scale
from multirun_analysis.figures.canvas import COLOURS, LINES, Canvas, Figure
from multirun_analysis.figures.groups import circumstances, left_out
from multirun_analysis.runs import History, Run

MAX_LINES = 8
STEP_HISTORY = "decode_step_s_by_step"
WINDOWS = 12
"""A line is a median over a twelfth of its steps: single slow steps do not hide the trend."""
RAW_LINES = 4
"""Up to so many lines, the steps themselves are faint points behind them."""


def smoothed(points: History) -> History:
    """Take the median over a window around each step; the window is a twelfth of all steps."""
    half = max(1, len(points) // (2 * WINDOWS))
    values = [value for _, value in points]
    return tuple(
        (step, statistics.median(values[max(0, index - half) : index + half + 1]))
        for index, (step, _) in enumerate(points)
    )


def decode_latency(
    canvas: Canvas,
    chosen: Sequence[tuple[str, Configuration]],
    history: Callable[[Run, str], History],
) -> Figure:
    """Draw one smoothed line for each of the fastest configurations."""
    title = "Decode latency over tokens"
    lines = [
        (label, item, points)
        for label, item in chosen[:MAX_LINES]
        if len(points := history(item.newest, STEP_HISTORY)) > 2
    ]
    if not lines:
        missing = f"No run logged {STEP_HISTORY}."
        return Figure(name="latency", title=title, caption="", missing=missing)
    axes = canvas.axes(1.25)
    shown = []
    for number, (label, _, points) in enumerate(lines):
        colour, line = COLOURS[number % len(COLOURS)], LINES[number // len(COLOURS) % len(LINES)]
        trend = smoothed(points)
        tokens = [step + 2 for step, _ in points]
        shown += [value * 1e3 for _, value in trend]
        if len(lines) <= RAW_LINES:
            raw = [value * 1e3 for _, value in points]
            axes.plot(tokens, raw, ".", color=colour, alpha=0.3, markersize=3)
        name = label.replace("\n", ", ")
        axes.plot(tokens, [value * 1e3 for _, value in trend], line, color=colour, label=name)
    scale(axes, shown)
    axes.margins(x=0.03)
    axes.set_xlabel("new token (the first comes from the prefill)")
    axes.set_ylabel("time of its decode step (ms)")
    legend_below(axes, 1)
    more = left_out(chosen, MAX_LINES, "configurations")
    caption = (
        "Lines: median over a twelfth of the steps. Points: each step, median over the timed "
        "generations; slower ones than the frame shows are in decode_step_s_max. The newest run of "
        "the fastest configuration of each model and place of its weights."
        f"{more} {circumstances(item for _, item, _ in lines)}"
    )
    panels = (canvas.panel("latency", axes, "Decode steps"),)
    return Figure(name="latency", title=title, caption=caption, panels=panels)
