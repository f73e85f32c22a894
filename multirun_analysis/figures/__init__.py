"""Comparisons -> figures. Each answers one question, or says in a sentence why it cannot."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multirun_analysis.compare import same_circumstances
from multirun_analysis.figures.canvas import Canvas, Figure
from multirun_analysis.figures.groups import Group, leaders
from multirun_analysis.figures.hardware import ceiling, step_time
from multirun_analysis.figures.latency import decode_latency
from multirun_analysis.figures.memory import memory
from multirun_analysis.figures.plans import plans
from multirun_analysis.figures.quality import quality
from multirun_analysis.figures.speedup import speedup
from multirun_analysis.figures.throughput import throughput
from multirun_analysis.figures.tradeoff import latency_tradeoff, memory_tradeoff, quality_tradeoff
from multirun_analysis.progress import Progress, silent
from multirun_analysis.published.beside import Comparison
from multirun_analysis.ratios import Baseline, Ratio
from multirun_analysis.runs import History, Run


def draw(
    canvas: Canvas,
    found: Group,
    ratios: Sequence[Ratio],
    baseline: Baseline | None,
    comparisons: Sequence[Comparison],
    history: Callable[[Run, str], History],
    progress: Progress = silent,
) -> tuple[Figure, ...]:
    """Draw every figure of a report, in its order."""
    groups = [
        (label, group)
        for label, group in same_circumstances(found)
        if any(item.measured for item in group)
    ]
    several = [
        (label, group) for label, group in groups if sum(item.measured for item in group) > 1
    ] or groups
    in_order: tuple[Callable[[], Figure], ...] = (
        lambda: throughput(canvas, several),
        lambda: memory_tradeoff(canvas, groups),
        lambda: latency_tradeoff(canvas, groups),
        lambda: quality_tradeoff(canvas, groups),
        lambda: ceiling(canvas, found),
        lambda: step_time(canvas, leaders(groups)),
        lambda: memory(canvas, leaders(groups)),
        lambda: speedup(canvas, ratios, baseline),
        lambda: decode_latency(canvas, leaders(groups), history),
        lambda: quality(canvas, found),
        lambda: plans(canvas, found, comparisons),
    )
    figures = []
    for number, draw_one in enumerate(in_order):
        progress("drawing figures", number + 1, len(in_order))
        figures.append(draw_one())
    return tuple(figures)
