"""Figure: what plans allow and predict, beside what was published of the same configuration."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.compare import details
from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.axes import legend_below, scale
from multirun_analysis.figures.canvas import COLOURS, Canvas, Figure, Panel, in_two_lines
from multirun_analysis.figures.groups import MAX_BARS, Group, circumstances, left_out
from multirun_analysis.labels import WEIGHTS_ON
from multirun_analysis.published.beside import Comparison
from multirun_analysis.tables.plans import fits

CEILING, PREDICTED = "ceiling_generated_tokens_per_s", "predicted_generated_tokens_per_s"


def plans(canvas: Canvas, found: Group, comparisons: Sequence[Comparison]) -> Figure:
    """Draw a row for each plan that fits, first those that a published number stands beside."""
    title = "What the plans allow"
    published = {
        id(item.planned): item.published.tokens_per_s
        for item in comparisons
        if item.planned is not None
        and item.published.tokens_per_s
        and item.published.standing == "as published"
    }
    known = [item for item in found if item.planned and item.value(CEILING) and fits(item) == "yes"]
    if not known:
        missing = "No plan that fits has a ceiling."
        return Figure(name="plans", title=title, caption="", missing=missing)
    ordered = sorted(
        known, key=lambda item: (id(item) not in published, -(item.value(CEILING) or 0))
    )
    rows = [(item, published.get(id(item))) for item in ordered[:MAX_BARS]]
    beside = " The diamond is what was published of the same configuration." if published else ""
    caption = (
        f"Generated tokens/s that the slowest resource allows.{beside}"
        f"{left_out(ordered, MAX_BARS, 'plans')} {circumstances(item for item, _ in rows)}"
    )
    return Figure(name="plans", title=title, caption=caption, panels=(_panel(canvas, rows),))


def _panel(canvas: Canvas, rows: Sequence[tuple[Configuration, float | None]]) -> Panel:
    axes = canvas.axes(max(0.4, 0.1 * len(rows) + 0.3))
    names = details([item for item, _ in rows])
    values = []
    for index, (item, published) in enumerate(rows):
        limit, predicted = item.value(CEILING) or 0.0, item.value(PREDICTED)
        values += [limit, *filter(None, (predicted, published))]
        lowest = min(filter(None, (limit, predicted, published)))
        axes.plot([lowest, limit], [index, index], color=COLOURS[4], linewidth=1.2, zorder=0)
        for value, marker, colour, label in (
            (limit, "|", COLOURS[0], "at most"),
            (predicted, "o", COLOURS[0], "predicted"),
            (published, "D", COLOURS[5], "published"),
        ):
            if value:
                known = axes.get_legend_handles_labels()[1]
                size = 12 if marker == "|" else 6
                axes.plot(
                    value,
                    index,
                    marker,
                    color=colour,
                    markersize=size,
                    markeredgewidth=2 if marker == "|" else 0,
                    label=None if label in known else label,
                    linestyle="none",
                )
    scale(axes, values, "x")
    axes.set_yticks(
        range(len(rows)), [in_two_lines(_name(item, names)) for item, _ in rows], fontsize=8
    )
    axes.invert_yaxis()
    axes.set_xlabel("generated tokens/s")
    axes.grid(axis="y", visible=False)
    legend_below(axes, 3)
    return canvas.panel("plans", axes, "Plans that fit")


def _name(item: Configuration, names: Sequence[str]) -> str:
    where = WEIGHTS_ON.get(item.offload, item.offload)
    parts = item.model, where, item.dtype, f"batch {item.batch_size}", item.label(names)
    return ", ".join(filter(None, parts))
