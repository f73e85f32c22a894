"""Ctrl-C, SIGTERM and SIGHUP: a job is ended in order, whatever the driver does at that moment.

So it is at the warning of a batch system before its time limit or a preemption (SIGUSR2). Where
the launcher handles that signal, the launcher gets it once the job has ended: it may requeue it.

Outside of a job the first signal raises KeyboardInterrupt as usual. Inside `in_order()` it only
sets a flag, which the job looks at, so that a result is never lost half-written. The second signal
ends every wait for others: a store, a server.
"""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any, ClassVar

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)
"""Signals of batch systems that come before the end. Taken only where the launcher handles them."""
SECOND = b"\nzinfer waits for nothing any more: it ends the job and leaves its run to task=upload\n"


class Interrupts:
    """The signals that have arrived in this process."""

    received: ClassVar[bool] = False
    insisted: ClassVar[bool] = False
    """A second signal came: no wait for others is worth it any more."""
    sign: ClassVar[signal.Signals | None] = None
    """The first signal that came."""
    _deferred: ClassVar[int] = 0
    _launchers: ClassVar[dict[int, Callable[[int, FrameType | None], Any]]] = {}
    """Signal -> the launcher's own handler of it."""

    @classmethod
    def install(cls) -> None:
        """Handle the signals. Those ignored at the start (nohup) stay so; main thread only."""
        if threading.current_thread() is not threading.main_thread():
            return
        for sign in SIGNALS:
            if signal.getsignal(sign) is not signal.SIG_IGN:
                signal.signal(sign, cls._handle)
        for sign in WARNINGS:
            handler = signal.getsignal(sign)
            if callable(handler) and handler != cls._handle_warning:
                cls._launchers[sign] = handler
                signal.signal(sign, cls._handle_warning)

    @classmethod
    def _handle(cls, sign: int, frame: FrameType | None) -> None:
        first, cls.received = not cls.received, True
        if first:
            cls.sign = signal.Signals(sign)
        if not cls._deferred and first:
            raise KeyboardInterrupt
        if not first and not cls.insisted:
            cls.insisted = True
            os.write(2, SECOND)

    @classmethod
    def _handle_warning(cls, sign: int, frame: FrameType | None) -> None:
        if not cls._deferred:
            cls._launchers[sign](sign, frame)
        elif not cls.received:
            cls.received, cls.sign = True, signal.Signals(sign)

    @classmethod
    def hand_on(cls) -> None:
        """Give the launcher its own signal, now that the job has ended in order.

        Raises:
            SystemExit: the launcher has requeued the job.
            Exception: it has not, for a reason of its own.
        """
        if cls.sign is not None and cls.sign in cls._launchers:
            cls._launchers[cls.sign](cls.sign, None)

    @classmethod
    def has_insisted(cls) -> bool:
        """Tell waits if a second signal has come, which ends them."""
        return cls.insisted

    @classmethod
    @contextlib.contextmanager
    def in_order(cls) -> Iterator[None]:
        """Let signals only set `received` and `insisted` inside."""
        cls._deferred += 1
        try:
            yield
        finally:
            cls._deferred -= 1

    @classmethod
    @contextlib.contextmanager
    def at_once(cls) -> Iterator[None]:
        """Let a signal leave a long step anywhere, inside in_order().

        Raises:
            KeyboardInterrupt: a signal arrives, or has arrived before.
        """
        deferred, cls._deferred = cls._deferred, 0
        try:
            if cls.received:
                raise KeyboardInterrupt
            yield
        finally:
            cls._deferred = deferred
