"""Axes: where they start, where their ticks are, and where the legend goes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

LOGARITHMIC_FROM = 20.0
"""Largest over smallest value from which an axis is logarithmic."""
ZERO_FROM = 3.0
"""Largest over smallest value from which a linear axis starts at 0; below, that would push all
points together."""
LEGEND_CHARACTERS, MARK_CHARACTERS = 84, 6
"""Of a line of the legend, and those that the mark before a label takes the place of."""
MARGIN = 0.09
"""Of the axis, kept free on both sides so that no marker is cut off."""


def legend_below(axes: Any, columns: int) -> None:
    """Put the legend outside of the data, so that it hides nothing.

    Args:
        columns: as many at most; long labels get fewer, so that none leaves the drawing.
    """
    handles, labels = axes.get_legend_handles_labels()
    if handles:
        longest = MARK_CHARACTERS + max(map(len, labels))
        columns = max(1, min(columns, LEGEND_CHARACTERS // longest))
        axes.figure.legend(handles, labels, loc="outside lower center", ncols=columns)


def plain_ticks(axis: Any) -> None:
    """Write 1, 10, 1,000 instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, NullFormatter

    axis.set_major_formatter(
        FuncFormatter(lambda value, _: f"{value:,.4g}" if abs(value) < 1e4 else f"{value:,.0f}")
    )
    axis.set_minor_formatter(NullFormatter())


def powers_of_two(axes: Any, values: Sequence[float]) -> None:
    """Make a batch axis: logarithmic, a tick at each batch that was run."""
    from matplotlib.ticker import FixedLocator, NullLocator

    axes.set_xscale("log", base=2)
    ticks = sorted(set(values))
    axes.set_xlim(ticks[0] / 1.3, ticks[-1] * 1.3)
    while len(ticks) > 10:
        ticks = ticks[::2]
    axes.xaxis.set_major_locator(FixedLocator(ticks))
    axes.xaxis.set_minor_locator(NullLocator())
    plain_ticks(axes.xaxis)


def scale(axes: Any, values: Sequence[float], axis: str = "y") -> None:
    """Choose the scale by how far the values lie apart, with a margin around all of them.

    Logarithmic from a factor of 20; from 0 from a factor of 3; else around the values.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    known = [value for value in values if value > 0]
    which = axes.yaxis if axis == "y" else axes.xaxis
    limit = axes.set_ylim if axis == "y" else axes.set_xlim
    if not known:
        return
    low, high = min(known), max(known)
    if high / low > LOGARITHMIC_FROM:
        getattr(axes, f"set_{axis}scale")("log")
        room = (high / low) ** MARGIN
        limit(low / room, high * room)
        subs = (1.0,) if high / low > 300 else (1.0, 2.0, 5.0)
        which.set_major_locator(LogLocator(subs=subs))
        which.set_minor_locator(NullLocator())
    elif high / low > ZERO_FROM:
        limit(0, high * (1 + MARGIN))
    else:
        room = max((high - low) * 2 * MARGIN, high * 0.02)
        limit(low - room, high + room)
    plain_ticks(which)
