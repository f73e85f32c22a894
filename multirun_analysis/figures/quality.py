"""Figure: what fewer bytes of weights cost in quality."""

from __future__ import annotations

from multirun_analysis.compare import details
from multirun_analysis.figures.axes import legend_below, plain_ticks
from multirun_analysis.figures.canvas import COLOURS, MARKERS, Canvas, Figure, Panel, short
from multirun_analysis.figures.groups import Group, circumstances
from zinfer.units import GIB

METRICS = (
    ("quality_perplexity", "perplexity (lower is better)"),
    ("quality_token_agreement", "tokens equal to the reference (share)"),
)
CHANGE_TEXT = ("dtype.", "kv_cache.", "engine.", "quality.")
"""Groups of choices that change which tokens come out, or how they are scored."""


def quality(canvas: Canvas, found: Group) -> Figure:
    """Draw a panel for each measure of quality that was logged."""
    title = "Quality against bytes"
    panels, shown = [], []
    for metric, label in METRICS:
        known = [
            item
            for item in found
            if item.value(metric) is not None and item.value("weight_stored_bytes") is not None
        ]
        if known:
            panels.append(_panel(canvas, metric, label, known))
            shown += known
    if not panels:
        missing = (
            "No run logged quality_perplexity or quality_token_agreement, so what a smaller type "
            "does to the text is not known (quality.enabled=true scores it)."
        )
        return Figure(name="quality", title=title, caption="", missing=missing)
    return Figure(name="quality", title=title, caption=circumstances(shown), panels=tuple(panels))


def _panel(canvas: Canvas, metric: str, label: str, known: Group) -> Panel:
    axes = canvas.axes()
    names = [name for name in details(known) if name.startswith(CHANGE_TEXT)]
    kinds = sorted({(item.dtype, item.label(names)) for item in known})
    for number, model in enumerate(sorted({item.model for item in known})[: len(COLOURS)]):
        for style, (dtype, more) in enumerate(kinds):
            key = model, dtype, more
            mine = [item for item in known if (item.model, item.dtype, item.label(names)) == key]
            points = sorted(
                {
                    ((item.value("weight_stored_bytes") or 0) / GIB, item.value(metric) or 0)
                    for item in mine
                }
            )
            if points:
                axes.plot(
                    *zip(*points, strict=True),
                    MARKERS[style % len(MARKERS)],
                    color=COLOURS[number],
                    label=", ".join(filter(None, (short(model), dtype, short(more)))),
                )
    axes.margins(0.09)
    axes.set_xlabel("bytes of the stored weights (GiB)")
    axes.set_ylabel(label)
    plain_ticks(axes.yaxis)
    legend_below(axes, 2)
    return canvas.panel(f"quality-{metric}", axes, label)
