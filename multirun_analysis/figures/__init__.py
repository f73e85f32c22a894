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
    return (
        throughput(canvas, several),
        memory_tradeoff(canvas, groups),
        latency_tradeoff(canvas, groups),
        quality_tradeoff(canvas, groups),
        ceiling(canvas, found),
        step_time(canvas, leaders(groups)),
        memory(canvas, leaders(groups)),
        speedup(canvas, ratios, baseline),
        decode_latency(canvas, leaders(groups), history),
        quality(canvas, found),
        plans(canvas, found, comparisons),
    )
