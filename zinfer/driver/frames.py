"""Lay out the live table: a row for each phase of a job, for terminals of any width."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zinfer.driver.progress import WORDS, JobProgress, Phase
from zinfer.units import format_left, format_seconds

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.table import Table

BAR_WIDTH = 20
WIDE, MEDIUM = 84, 56
"""Columns from which on a line has everything, and the count but no bar."""


@dataclass(frozen=True)
class JobFrame:
    """One job: its label, then a line for each phase, those to come included."""

    progress: JobProgress
    now_s: float
    head: str = ""
    """A line above it: the sweep that the job belongs to."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for the width that the terminal has now."""
        progress, width = self.progress, options.max_width
        table = _grid(width)
        for phase in progress.phases:
            left_s = progress.seconds_left(self.now_s) if phase is progress.current else None
            _add(table, phase.words, phase, self.now_s, left_s, width)
        for name in progress.coming:
            table.add_row(f"  {WORDS.get(name, name)}", style="dim")
        yield from (line(text, style="bold") for text in (self.head, progress.label) if text)
        yield table


@dataclass(frozen=True)
class JobsFrame:
    """Jobs that run side by side: a line for each, with the phase that it is in."""

    jobs: tuple[JobProgress, ...]
    now_s: float
    head: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for the width that the terminal has now."""
        width = options.max_width
        table = _grid(width)
        for job in self.jobs:
            phase = job.current
            if phase is not None:
                said = f"{job.label}: {phase.words}"
                _add(table, said, phase, self.now_s, job.seconds_left(self.now_s), width)
        yield line(self.head, style="bold")
        yield table


def line(text: str, style: str = "") -> RenderableType:
    """Return one line, cut with an ellipsis where the terminal is narrower."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")


def _grid(width: int) -> Table:
    from rich.table import Table

    table = Table.grid(padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, overflow="ellipsis")
    for justify in ("right", "left", "left") if width >= MEDIUM else ("right", "left"):
        table.add_column(justify=justify, no_wrap=True, overflow="ellipsis")
    return table


def _add(
    table: Table, words: str, phase: Phase, now_s: float, left_s: float | None, width: int
) -> None:
    """Add the line of a phase: dim once it is over, with its share and time left while it runs."""
    is_over = phase.ended_s is not None
    took = _clock(phase.elapsed_s(now_s))
    left = "" if left_s is None else format_left(left_s)
    share = "" if phase.share is None or is_over else f"{phase.share:.0%}"
    if width >= MEDIUM:
        shown = "" if is_over else _share(phase, share, width)
        cells = [f"  {words}", took, shown, left]
    else:
        cells = [f"  {words}", share or took, left.removeprefix("about ")]
    table.add_row(*cells, style="dim" if is_over else "")


def _share(phase: Phase, share: str, width: int) -> str:
    """Return the bar, the percentage and the count; no bar where lines are short."""
    if phase.share is None:
        return ""
    filled = int(phase.share * BAR_WIDTH)
    bar = f"{'#' * filled}{'.' * (BAR_WIDTH - filled)} " if width >= WIDE else ""
    return f"{bar}{share:>4} {phase.count}"


def _clock(seconds: float) -> str:
    """Show a duration without fractions that nobody reads while they change."""
    return format_seconds(seconds) if seconds >= 99.5 else f"{seconds:.0f} s"
