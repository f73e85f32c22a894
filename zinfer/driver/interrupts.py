"""Ctrl-C and SIGTERM: a job is ended in order, whatever the driver does at that moment.

Outside of a job the first signal raises KeyboardInterrupt as usual. Inside `in_order()` it only sets a flag, which the job looks at, so
that a result is never lost half-written; every further signal is answered with a sentence.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class Interrupts:
    """What has arrived in this process."""

    received: ClassVar[bool] = False
    _deferred: ClassVar[int] = 0

    @classmethod
    def install(cls) -> None:
        """Handle the signals; those that were ignored at the start (nohup) stay ignored. Only the main thread can."""
        if threading.current_thread() is not threading.main_thread():
            return
        for sign in SIGNALS:
            if signal.getsignal(sign) is not signal.SIG_IGN:
                signal.signal(sign, cls._handle)

    @classmethod
    def _handle(cls, sign: int, frame: FrameType | None) -> None:
        first, cls.received = not cls.received, True
        if not cls._deferred and first:
            raise KeyboardInterrupt
        if not first:
            os.write(2, b"\nzinfer is ending the job and closing its run: a few seconds\n")

    @classmethod
    @contextlib.contextmanager
    def in_order(cls) -> Iterator[None]:
        """Signals only set `received`."""
        cls._deferred += 1
        try:
            yield
        finally:
            cls._deferred -= 1

    @classmethod
    @contextlib.contextmanager
    def at_once(cls) -> Iterator[None]:
        """Inside in_order(): a long step that may be left anywhere. Raises KeyboardInterrupt, also for what has arrived before."""
        deferred, cls._deferred = cls._deferred, 0
        try:
            if cls.received:
                raise KeyboardInterrupt
            yield
        finally:
            cls._deferred = deferred
