"""Show the step that a report is at: live on a terminal, a line for each step elsewhere."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol, TextIO

from zinfer.output import is_live

READING = "reading runs"


class Progress(Protocol):
    """Called with each step, and again as it goes on."""

    def __call__(self, step: str, done: int = 0, total: int | None = None) -> None:
        """Say what is being done, how much of it is done, and of how much if that is known."""


def silent(step: str, done: int = 0, total: int | None = None) -> None:
    """Show nothing."""


def step_text(step: str, done: int, total: int | None) -> str:
    """Return 'drawing figures: 3 of 11', 'reading runs: 500 so far', or the step alone."""
    if total is not None:
        return f"{step}: {min(done, total)} of {total}"
    return f"{step}: {done} so far" if done else step


class LogLines:
    """Writes one line for each step."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self._last = ""

    def __call__(self, step: str, done: int = 0, total: int | None = None) -> None:
        """Write the line of a new step."""
        if step != self._last:
            self._last = step
            print(f"zinfer-report: {step}", file=self._stream, flush=True)


@contextmanager
def shown_progress() -> Iterator[Progress]:
    """Show the steps on stderr; on a terminal they are gone when the report is there."""
    if not is_live(sys.stderr):
        yield LogLines(sys.stderr)
        return
    from rich.console import Console

    with Console(stderr=True).status(READING) as status:

        def show(step: str, done: int = 0, total: int | None = None) -> None:
            status.update(step_text(step, done, total))

        yield show
