"""How figures look and how they are stored: an SVG and a PNG for each panel, and the SVG once more for the report, in its colours."""

from __future__ import annotations

import io
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

INK = "#1b1f24"
"""Text and axes. In the report this very colour becomes the page's own, so that it can be dark or light."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Told apart with any kind of colour vision. Source: Okabe and Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/"""
OFFLOAD_COLOURS = {"none": COLOURS[0], "cpu": COLOURS[1], "nvme": COLOURS[2]}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
PANEL_INCHES = (5.6, 3.7)
PNG_DPI = 150

STYLE = {
    "font.family": "sans-serif",
    "font.size": 9.5,
    "axes.titlesize": 10.5,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.titlecolor": INK,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "axes.grid": True,
    "grid.color": INK,
    "grid.alpha": 0.12,
    "grid.linewidth": 0.7,
    "legend.frameon": False,
    "legend.fontsize": 8.5,
    "lines.linewidth": 1.6,
    "lines.markersize": 5,
    "text.parse_math": False,  # a dollar sign in a name is a dollar sign
    "svg.fonttype": "none",  # text stays text: searchable, in the page's font
    "axes.formatter.useoffset": False,
}


@dataclass(frozen=True, kw_only=True)
class Panel:
    """One drawing, stored as files and kept as SVG for the report."""

    name: str
    title: str
    svg: str
    """Without XML prologue, in the page's own ink."""


@dataclass(frozen=True, kw_only=True)
class Figure:
    """What one question looks like: a panel for each model, or the sentence why there is none."""

    name: str
    title: str
    caption: str
    panels: tuple[Panel, ...] = ()
    missing: str | None = None


class Canvas:
    """Makes panels and writes their files."""

    def __init__(self, folder: Path) -> None:
        import matplotlib

        self._folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        self._style = matplotlib.rc_context(
            {**matplotlib.rcParamsDefault, **STYLE, "backend": "agg"}
        )

    def __enter__(self) -> Canvas:
        self._style.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._style.__exit__(*error)

    def axes(self, height: float = 1.0) -> Any:
        """Axes of a new drawing; `height` in panels."""
        from matplotlib.figure import Figure as Drawing

        width, tall = PANEL_INCHES
        return Drawing(
            figsize=(width, tall * height), layout="constrained", facecolor="none"
        ).add_subplot(facecolor="none")

    def panel(self, name: str, axes: Any, title: str) -> Panel:
        """Store a drawing as NAME.svg and NAME.png. Each is drawn once: savefig would draw everything twice."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        axes.set_title(title)
        name, drawing, text = file_name(name), axes.figure, io.StringIO()
        with matplotlib.rc_context(
            {"svg.hashsalt": name}
        ):  # ids that are the same in every report and differ between its panels
            FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        (self._folder / f"{name}.svg").write_text(on_paper(svg))
        drawing.set_layout_engine("none")  # it is laid out now
        drawing.set_facecolor("white")
        drawing.set_dpi(PNG_DPI)
        FigureCanvasAgg(drawing).print_png(self._folder / f"{name}.png")
        return Panel(name=name, title=title, svg=in_page(svg, title))


def file_name(text: str) -> str:
    """Letters, digits, dots, dashes and underscores only."""
    return re.sub(r"[^\w.-]+", "-", text).strip("-.") or "figure"


def on_paper(svg: str) -> str:
    """A standalone file: on white."""
    end = svg.index(">") + 1
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + svg[:end]
        + '<rect width="100%" height="100%" fill="white"/>'
        + svg[end:]
    )


def in_page(svg: str, title: str) -> str:
    """For the report: scales with its column, takes the page's ink, and names itself to screen readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    label = title.replace("&", "&amp;").replace("<", "&lt;").replace('"', "&quot;")
    svg = re.sub(r"font: ([\w. ]*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor").replace(
        "<svg ", f'<svg role="img" aria-label="{label}" ', 1
    )


def legend_below(axes: Any, columns: int) -> None:
    """Outside of the data, so that it hides nothing."""
    handles, labels = axes.get_legend_handles_labels()
    axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain_ticks(axis: Any) -> None:
    """1, 10, 1,000 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.4g}" if value < 1e4 else f"{value:,.0f}")
    )
    axis.set_minor_formatter(NullFormatter())


def powers_of_two(axes: Any, values: Sequence[float]) -> None:
    """A batch axis: logarithmic, a tick at each batch that was run."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    while len(ticks) > 10:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes.xaxis)


def log_if_wide(axes: Any, values: Sequence[float], axis: str = "y") -> None:
    """Logarithmic where the values span more than a factor of 20, from zero otherwise."""
    from matplotlib.ticker import LogLocator, NullLocator

    known = [value for value in values if value > 0]
    which = axes.yaxis if axis == "y" else axes.xaxis
    if known and max(known) / min(known) > 20:
        getattr(axes, f"set_{axis}scale")("log")
        subs = (1.0,) if max(known) / min(known) > 300 else (1.0, 2.0, 5.0)
        which.set_major_locator(LogLocator(subs=subs))
        which.set_minor_locator(NullLocator())
    else:
        getattr(axes, f"set_{axis}lim")(**{"bottom" if axis == "y" else "left": 0})
    plain_ticks(which)
