"""Lay out the live table: a line for each phase of a job, for terminals of any width.

What does not fit goes in this order: the bar, the count, the words around the time left. Names and
times of phases are never cut; labels of jobs are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zinfer.driver.progress import WORDS, JobProgress, Phase
from zinfer.units import format_bytes, format_left, format_roughly

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderResult
    from rich.text import Text

BAR_WIDTH = 20
LABEL_WIDTH, REST_WIDTH = 12, 36
"""Of jobs side by side: least characters of a label, and what is kept for share and time left."""


@dataclass(frozen=True)
class Row:
    """One line: a name, a time, and what is said beside them in order of length."""

    name: str
    took: str = ""
    said: Sequence[str] = ("",)
    style: str = ""

    def text(self, name_width: int, took_width: int, width: int) -> Text:
        """Return the line with the longest sayings that fit."""
        start = f"  {self.name:<{name_width}}  {self.took:>{took_width}}"
        fitting = (said for said in self.said if len(start) + 2 + len(said) <= width)
        return line(f"{start}  {next(fitting, '')}".rstrip(), self.style)


@dataclass(frozen=True)
class JobFrame:
    """One job: its label, then a line for each phase, those to come included."""

    progress: JobProgress
    now_s: float
    head: str = ""
    """A line above it: the sweep that the job belongs to."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for the width that the terminal has now."""
        progress = self.progress
        rows = [phase_row(phase, progress, self.now_s) for phase in progress.phases]
        rows += [Row(WORDS.get(name, name), style="dim") for name in progress.coming]
        yield from (line(text, "bold") for text in (self.head, progress.label) if text)
        yield from lines(rows, options.max_width)


@dataclass(frozen=True)
class JobsFrame:
    """Jobs that run side by side: a line for each, with the phase that it is in."""

    jobs: tuple[JobProgress, ...]
    now_s: float
    head: str = ""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        """Lay it out for the width that the terminal has now."""
        width = options.max_width
        phases = [(job, job.current) for job in self.jobs]
        rows = [(job, phase_row(phase, job, self.now_s)) for job, phase in phases if phase]
        room = width - REST_WIDTH - max((len(row.name + row.took) for _, row in rows), default=0)
        room = max(LABEL_WIDTH, min(room, max((len(job.label) for job, _ in rows), default=0)))
        named = [
            Row(f"{cut(job.label, room):<{room}}  {row.name}", row.took, row.said)
            for job, row in rows
        ]
        yield line(self.head, "bold")
        yield from lines(named, width)


def lines(rows: Sequence[Row], width: int) -> Iterator[Text]:
    """Yield the lines of rows, their columns below each other."""
    name_width = max((len(row.name) for row in rows), default=0)
    took_width = max((len(row.took) for row in rows), default=0)
    for row in rows:
        yield row.text(name_width, took_width, width)


def phase_row(phase: Phase, progress: JobProgress, now_s: float) -> Row:
    """Return the line of a phase: dim once it is over, with share and time left while it runs."""
    took = clock(phase.elapsed_s(now_s))
    if phase.ended_s is not None:
        return Row(phase.words, took, style="dim")
    return Row(phase.words, took, list(sayings(phase, progress.seconds_left(now_s))))


def sayings(phase: Phase, left_s: float | None) -> Iterator[str]:
    """Yield what is known of a phase that runs, the longest text first."""
    left = () if left_s is None else (format_left(left_s),)
    if phase.share is not None and phase.done:
        filled = int(phase.share * BAR_WIDTH)
        share = f"{phase.share:>4.0%}"
        yield "  ".join((f"{'#' * filled:.<{BAR_WIDTH}} {share} {phase.count}", *left))
        yield "  ".join((f"{share} {phase.count}", *left))
        yield "  ".join((share, *left))
        if left_s is not None:
            yield f"{share}  {format_roughly(left_s)}"
        yield share
    else:
        if phase.unit == "bytes" and phase.total:
            yield "  ".join((format_bytes(phase.total), *left))
        yield from left


def clock(seconds: float) -> str:
    """Show a duration without the digits that nobody reads while they change: '45 s', '3 min'."""
    if seconds < 99.5:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def cut(text: str, width: int) -> str:
    """Return at most so many characters, the end of a longer text left out."""
    return text if len(text) <= width else f"{text[: width - 1]}…"


def line(text: str, style: str = "") -> Text:
    """Return one line, cut with an ellipsis where the terminal is narrower."""
    from rich.text import Text

    return Text(text, style=style, no_wrap=True, overflow="ellipsis")
