"""Bound what a store may take: every call to one ends after tracking.timeout_s.

A store that answers and then hangs would hold the command for minutes. Its calls run in a thread
that is left behind when their time is over, or when somebody insists (the second Ctrl-C).
"""

from __future__ import annotations

import os
import sys
import threading
import time
from collections.abc import Callable
from typing import ClassVar, NoReturn, TypeVar

T = TypeVar("T")
LOOK_S = 0.05
"""Between two looks at whether somebody gives up."""
STORE_TIMEOUT_S = 60.0
"""For calls to a store outside of a job, such as the end of a sweep."""


def never() -> bool:
    """Never give up before the time is over."""
    return False


class LeftBehind:
    """Threads that still wait for a store. The interpreter would wait for them at its end."""

    threads: ClassVar[list[threading.Thread]] = []

    @classmethod
    def alive(cls) -> bool:
        """Say whether one of them still waits."""
        return any(thread.is_alive() for thread in cls.threads)

    @classmethod
    def exit(cls, code: int) -> NoReturn:
        """End the process with this code, without waiting for what was left behind."""
        if not cls.alive():
            sys.exit(code)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def within(
    timeout_s: float, call: Callable[[], T], what: str, give_up: Callable[[], bool] = never
) -> T:
    """Return call()'s value, or raise its exception, in at most `timeout_s`.

    Args:
        what: the store, for the message.
        give_up: asked many times a second; True ends the wait at once.

    Raises:
        TrackingUnavailable: it took too long, or was given up. The call goes on in its thread.
    """
    from zinfer.tracking.store import TrackingUnavailable

    done: list[T] = []
    failed: list[BaseException] = []

    def run() -> None:
        try:
            done.append(call())
        except BaseException as error:
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    deadline_s = time.monotonic() + timeout_s
    try:
        while thread.is_alive():
            thread.join(LOOK_S)
            if not thread.is_alive():
                break
            if give_up():
                raise TrackingUnavailable(f"{what} was not waited for: interrupted")
            if time.monotonic() > deadline_s:
                raise TrackingUnavailable(
                    f"{what} did not answer within {timeout_s:g} s",
                    settings=(f"tracking.timeout_s={2 * timeout_s:g}", "tracking=sqlite"),
                )
    except BaseException:
        LeftBehind.threads.append(thread)
        raise
    if failed:
        raise failed[0]
    return done[0]
