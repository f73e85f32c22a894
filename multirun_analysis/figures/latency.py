"""Figure: the time of each decode step, which grows with the KV cache."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.axes import legend_below, scale
from multirun_analysis.figures.canvas import COLOURS, LINES, Canvas, Figure, Panel
from multirun_analysis.figures.groups import circumstances, left_out
from multirun_analysis.runs import History, Run

MAX_LINES = 6
STEP_HISTORY = "decode_step_s_by_step"
WINDOWS = 12
"""A line is a median over a twelfth of its steps: single slow steps do not hide the trend."""
TOGETHER_WITHIN = 2.0
"""Lines that lie further apart get a panel each: on one axis all of them would look flat."""


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
    """Draw the steps of the fastest configurations: together, or in panels where far apart."""
    title = "Decode latency over tokens"
    lines = [
        (label.replace("\n", ", "), item, points)
        for label, item in chosen[:MAX_LINES]
        if len(points := history(item.newest, STEP_HISTORY)) > 2
    ]
    if not lines:
        missing = f"No run logged {STEP_HISTORY}."
        return Figure(name="latency", title=title, caption="", missing=missing)
    middles = [statistics.median(value for _, value in points) for _, _, points in lines]
    together = max(middles) <= TOGETHER_WITHIN * min(middles)
    drawn = [(label, points) for label, _, points in lines]
    if together:
        panels = [_panel(canvas, "latency", "Decode steps", drawn, legend=len(drawn) > 1)]
    else:
        panels = [
            _panel(canvas, f"latency-{number}", label, [(label, points)], legend=False)
            for number, (label, points) in enumerate(drawn)
        ]
    more = left_out(chosen, MAX_LINES, "configurations")
    caption = (
        "Lines: median over a twelfth of the steps. Points: each step, median over the timed "
        "generations; slower ones than the frame shows are in decode_step_s_max. The newest run of "
        "the fastest configuration of each model and place of its weights."
        f"{more} {circumstances(item for _, item, _ in lines)}"
    )
    return Figure(name="latency", title=title, caption=caption, panels=tuple(panels))


def _panel(
    canvas: Canvas, name: str, title: str, lines: Sequence[tuple[str, History]], *, legend: bool
) -> Panel:
    axes = canvas.axes(1.1 if legend else 0.85)
    shown = []
    for number, (label, points) in enumerate(lines):
        colour = COLOURS[number % len(COLOURS)]
        trend, tokens = smoothed(points), [step + 2 for step, _ in points]
        raw = [value * 1e3 for _, value in points]
        axes.plot(tokens, raw, ".", color=colour, alpha=0.3, markersize=3)
        style = LINES[number // len(COLOURS) % len(LINES)]
        axes.plot(tokens, [value * 1e3 for _, value in trend], style, color=colour, label=label)
        shown += [*(value * 1e3 for _, value in trend), *_usual(raw)]
    scale(axes, shown)
    axes.margins(x=0.03)
    axes.set_xlabel("new token (the first comes from the prefill)")
    axes.set_ylabel("time of its decode step (ms)")
    if legend:
        legend_below(axes, 1)
    return canvas.panel(name, axes, title)


def _usual(values: Sequence[float]) -> list[float]:
    """Return values between the 2nd and the 98th percentile: a frame around them hides no trend."""
    ordered = sorted(values)
    cut = len(ordered) // 50
    return ordered[cut : len(ordered) - cut]
