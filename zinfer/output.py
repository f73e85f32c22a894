"""Print to standard output that may be closed, full or left by its reader, and end the job in
order.

A job takes minutes and its result is in its folder. That nobody can read what it prints is said
once, at the end, and never ends the job.
"""

from __future__ import annotations

import contextlib
import io
import os
import sys
from typing import TextIO

BROKEN_PIPE = 141
"""Exit code of a command whose reader left: 128 + SIGPIPE, as shells say it."""


class Output(io.TextIOBase):
    """A text stream that remembers its first error and drops everything after it."""

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream
        self.lost: OSError | None = None

    @property
    def encoding(self) -> str:  # type: ignore[override]
        """Encoding of the stream below."""
        return self._stream.encoding

    def write(self, text: str) -> int:
        """Write, or drop."""
        if self.lost is None:
            try:
                return self._stream.write(text)
            except OSError as error:
                self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush what is not dropped."""
        if self.lost is None:
            try:
                self._stream.flush()
            except OSError as error:
                self._lose(error)

    def isatty(self) -> bool:
        """Answer as the stream below does."""
        return self._stream.isatty()

    def fileno(self) -> int:
        """Answer as the stream below does."""
        return self._stream.fileno()

    def _lose(self, error: OSError) -> None:
        """Write to nowhere from now on; what lies in the stream's buffer goes there too."""
        self.lost = error
        nowhere = os.open(os.devnull, os.O_WRONLY)
        os.dup2(nowhere, self._stream.fileno())
        os.close(nowhere)
        with contextlib.suppress(OSError):
            self._stream.flush()


class Outputs:
    """Both streams of the command, guarded."""

    def __init__(self, out: Output, err: Output) -> None:
        self._out, self._err = out, err

    def close(self, code: int) -> int:
        """Flush; the exit code is `code`, or says that the output was lost."""
        self._out.flush()
        lost = self._out.lost
        if isinstance(lost, BrokenPipeError):
            return code or BROKEN_PIPE
        if lost is not None:
            print(f"the output could not be written: {lost.strerror or lost}", file=sys.stderr)
            code = code or 1
        self._err.flush()
        return code


def open_output() -> Outputs:
    """Guard sys.stdout and sys.stderr; descriptors that the caller closed lead to nowhere.

    A closed descriptor 1 would be given to the next file that is opened, and prints would land
    in that file.
    """
    for descriptor, name, mode in ((0, "stdin", "r"), (1, "stdout", "w"), (2, "stderr", "w")):
        try:
            os.fstat(descriptor)
        except OSError:
            opened = os.open(os.devnull, os.O_RDONLY if mode == "r" else os.O_WRONLY)
            if opened != descriptor:
                os.dup2(opened, descriptor)
                os.close(opened)
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, mode, closefd=False))
    out, err = Output(sys.stdout), Output(sys.stderr)
    sys.stdout, sys.stderr = out, err
    return Outputs(out, err)


def is_live(stream: TextIO) -> bool:
    """Return whether frames can be drawn there: a terminal that can move its cursor."""
    return stream.isatty() and os.environ.get("TERM", "dumb") not in ("dumb", "unknown")
