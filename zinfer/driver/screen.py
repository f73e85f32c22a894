"""Draw what changes at the bottom of the terminal, and print what stays above it.

A process has one screen at most. It is started by the first frame and erased by `close`. Where no
screen is open, `Screen.print_line` writes a plain line.
"""

from __future__ import annotations

import atexit
from typing import TYPE_CHECKING, ClassVar, TextIO

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.live import Live


class Screen:
    """The live part of this process's terminal."""

    current: ClassVar[Screen | None] = None

    def __init__(self, stream: TextIO) -> None:
        from rich.console import Console
        from rich.live import Live

        class Plain(Console):
            """A console that leaves the cursor visible, however the process ends."""

            def show_cursor(self, show: bool = True) -> bool:
                return False

        self.stream = stream
        self._console = Plain(file=stream, force_terminal=True, highlight=False, soft_wrap=False)
        self._live: Live = Live(
            console=self._console, auto_refresh=False, transient=True, redirect_stdout=False
        )
        self._live.start()

    @classmethod
    def show(cls, stream: TextIO, frame: RenderableType) -> None:
        """Draw this frame in place of the last one."""
        if cls.current is None:
            cls.current = cls(stream)
            atexit.register(cls.close)
        cls.current._live.update(frame, refresh=True)

    @classmethod
    def print_line(cls, stream: TextIO, line: str) -> None:
        """Print one line that stays, above the frame where there is one."""
        screen = cls.current
        if screen is not None and screen.stream is stream:
            from rich.text import Text

            screen._console.print(Text(line), soft_wrap=True)
        else:
            print(line, file=stream, flush=True)

    @classmethod
    def close(cls) -> None:
        """Erase the frame: the terminal is as it was before, with what was printed above."""
        screen, cls.current = cls.current, None
        if screen is not None:
            screen._live.stop()
