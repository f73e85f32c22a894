"""Look and storage of figures: an SVG and a PNG of each panel, and the SVG for the report."""

from __future__ import annotations

import io
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinfer.escape import for_html, printable

INK = "#1b1f24"
"""Text and axes. In the report this very colour becomes the page's own, dark or light."""
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442")
"""Told apart with any kind of colour vision.

Source: Okabe and Ito 2008, Color Universal Design, https://jfly.uni-koeln.de/color/
"""
OFFLOAD_COLOURS = {"none": COLOURS[0], "cpu": COLOURS[1], "nvme": COLOURS[2]}
MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")
LINES = ("-", "--", "-.", ":")
PANEL_INCHES = (5.6, 3.7)
EDGE_INCHES = 0.11
"""Kept free around a drawing: a browser's font may be wider than the one it was laid out with."""
PNG_DPI = 150
LABEL_CHARACTERS = 46
TITLE_CHARACTERS = 60

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
    """The answer to one question: a panel for each model, or the sentence why there is none."""

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
        self._names: list[str] = []
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
        """Return the axes of a new drawing; `height` in panels."""
        from matplotlib.figure import Figure as Drawing

        width, tall = PANEL_INCHES
        drawing = Drawing(figsize=(width, tall * height), layout="constrained", facecolor="none")
        drawing.get_layout_engine().set(w_pad=EDGE_INCHES, h_pad=EDGE_INCHES / 2)
        return drawing.add_subplot(facecolor="none")

    def panel(self, name: str, axes: Any, title: str) -> Panel:
        """Store a drawing as NAME.svg and NAME.png, each drawn once: savefig draws twice."""
        import matplotlib
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.backends.backend_svg import FigureCanvasSVG

        title = short(title, TITLE_CHARACTERS)
        axes.set_title(title)
        name, drawing, text = self._free_name(file_name(name)), axes.figure, io.StringIO()
        # ids that are the same in every report and differ between its panels
        with matplotlib.rc_context({"svg.hashsalt": name}):
            FigureCanvasSVG(drawing).print_svg(text, metadata={"Date": None, "Creator": None})
        svg = text.getvalue()
        svg = svg[svg.index("<svg") :]
        (self._folder / f"{name}.svg").write_text(on_paper(svg))
        drawing.set_layout_engine("none")  # it is laid out now
        drawing.set_facecolor("white")
        drawing.set_dpi(PNG_DPI)
        FigureCanvasAgg(drawing).print_png(self._folder / f"{name}.png")
        return Panel(name=name, title=title, svg=in_page(svg, title))

    def _free_name(self, name: str) -> str:
        """Return a free name: two that differ in forbidden characters must not become one file."""
        taken = sum(known == name for known in self._names)
        self._names.append(name)
        return f"{name}-{taken + 1}" if taken else name


def file_name(text: str) -> str:
    """Keep letters, digits, dots, dashes and underscores only, and a length that any disk takes."""
    return re.sub(r"[^\w.-]+", "-", text, flags=re.ASCII).strip("-.")[:100] or "figure"


def short(text: str, characters: int = LABEL_CHARACTERS) -> str:
    """Fit a text into a drawing: without control characters, cut off where it is too long."""
    text = printable(text)
    return text if len(text) <= characters else text[: characters - 1] + "…"


def in_two_lines(text: str, characters: int = LABEL_CHARACTERS) -> str:
    """Fit a label into two lines, broken at a comma where that helps; the rest is cut off."""
    text = printable(text)
    if len(text) <= characters:
        return text
    at = text.rfind(", ", 0, characters) + 1
    if at == 0:
        return short(text, characters)
    return f"{text[:at]}\n{short(text[at + 1 :], characters)}"


def on_paper(svg: str) -> str:
    """Write a standalone file: on white."""
    end = svg.index(">") + 1
    return (
        '<?xml version="1.0" encoding="utf-8"?>\n'
        + svg[:end]
        + '<rect width="100%" height="100%" fill="white"/>'
        + svg[end:]
    )


def in_page(svg: str, title: str) -> str:
    """Make it scale with its column, take the page's ink, and name itself to screen readers."""
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    svg = re.sub(r'(<svg [^>]*?) (?:height|width)="[^"]*pt"', r"\1", svg)
    label = for_html(title)
    svg = re.sub(r"font: ([\w. ]*?px) [^;\"]*", r"font: \1 system-ui, sans-serif", svg)
    return svg.replace(INK, "currentColor").replace(
        "<svg ", f'<svg role="img" aria-label="{label}" ', 1
    )
