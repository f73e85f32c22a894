"""Run a command on a pseudo-terminal, and see what a person sees there."""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

CONTROL = re.compile(r"\x1b\[([0-9;?]*)([A-Za-z])")


class Screen:
    """Lines that a terminal shows after it was sent some text: cursor moves and erasing count."""

    def __init__(self, columns: int) -> None:
        self.columns = columns
        self.lines: list[str] = [""]
        self._row = self._column = 0
        self._rest = ""

    def feed(self, text: str) -> None:
        """Take more of what the program wrote."""
        text = self._rest + text
        cut = text.rfind("\x1b")
        whole = cut < 0 or CONTROL.match(text, cut) is not None
        text, self._rest = (text, "") if whole else (text[:cut], text[cut:])
        place = 0
        while place < len(text):
            if (found := CONTROL.match(text, place)) is not None:
                self._control(found[1], found[2])
                place = found.end()
            else:
                self._put(text[place])
                place += 1

    def _control(self, number: str, name: str) -> None:
        count = int(number) if number.isdigit() else 1
        if name == "A":
            self._row = max(0, self._row - count)
        elif name == "K":
            self.lines[self._row] = "" if number == "2" else self.lines[self._row][: self._column]

    def _put(self, character: str) -> None:
        if character == "\r":
            self._column = 0
        elif character == "\n":
            self._row, self._column = self._row + 1, 0
        else:
            if self._column == self.columns:
                self._row, self._column = self._row + 1, 0
            self._reach_row()
            line = self.lines[self._row].ljust(self._column)
            self.lines[self._row] = line[: self._column] + character + line[self._column + 1 :]
            self._column += 1
        self._reach_row()

    def _reach_row(self) -> None:
        while len(self.lines) <= self._row:
            self.lines.append("")

    @property
    def text(self) -> str:
        """Everything that is on it, or was scrolled off its top."""
        return "\n".join(line.rstrip() for line in self.lines)


@dataclass
class Seen:
    """What was seen of a command."""

    raw: str = ""
    frames: list[str] = field(default_factory=list)
    """The screen after each piece of output."""
    stdout: str = ""
    """Where it was a pipe."""
    code: int = 0

    @property
    def last(self) -> str:
        """The screen at the end."""
        return self.frames[-1] if self.frames else ""


def watch(
    command: Sequence[str | Path],
    folder: Path,
    *,
    columns: int = 100,
    rows: int = 40,
    stdout_is_pipe: bool = False,
    act: Callable[[subprocess.Popen[bytes], str], None] = lambda process, screen: None,
    timeout_s: float = 200.0,
    **variables: str,
) -> Seen:
    """Run a command with a terminal of this size, to its end.

    Args:
        stdout_is_pipe: only stdin and stderr are the terminal.
        act: called with the process and the screen after each piece of output.
    """
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    environment = {**os.environ, "TERM": "xterm-256color", **variables}
    for name in ("COLUMNS", "LINES"):
        environment.pop(name, None)
    process = subprocess.Popen(
        [*map(str, command)],
        cwd=folder,
        env=environment,
        stdin=theirs,
        stdout=subprocess.PIPE if stdout_is_pipe else theirs,
        stderr=theirs,
        start_new_session=True,
    )
    os.close(theirs)
    seen, screen = Seen(), Screen(columns)
    deadline_s = time.monotonic() + timeout_s
    while process.poll() is None or select.select([ours], [], [], 0)[0]:
        assert time.monotonic() < deadline_s, f"no end after {timeout_s} s: {seen.last}"
        if not select.select([ours], [], [], 0.1)[0]:
            continue
        try:
            piece = os.read(ours, 65536)
        except OSError:  # the last writer is gone
            break
        text = piece.decode(errors="replace")
        seen.raw += text
        screen.feed(text)
        seen.frames.append(screen.text)
        act(process, screen.text)
    os.close(ours)
    if process.stdout is not None:
        seen.stdout = process.stdout.read().decode()
    seen.code = process.wait()
    return seen


ZINFER = (sys.executable, "-m", "zinfer")
