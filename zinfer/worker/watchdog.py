"""End a worker in which nothing moves any more, and keep the stack of what it waited for.

Reads from NVMe can stop for good (DeepSpeed issues 7727 and 8196): the process then waits in C++,
uses no processor and reads no byte. From outside it looks like a slow run.
"""

from __future__ import annotations

import faulthandler
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from zinfer.job.events import EventLog

IDLE_SHARE = 0.02
"""Share of one core that waiting and watching may use."""
LOOKS = 10
"""How often it looks in the time that is allowed."""


@dataclass(frozen=True, kw_only=True)
class Signs:
    """The signs of life of one moment; each only grows."""

    steps: int
    """Events written: tokens, samples, bytes loaded."""
    block_bytes: int
    """Read from and written to block devices. Source: proc(5), io."""
    cpu_s: float


def signs(events: EventLog) -> Signs:
    """Look at this process."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return Signs(
        steps=events.written,
        block_bytes=_block_bytes(),
        cpu_s=used.ru_utime + used.ru_stime,
    )


def moved(before: Signs, now: Signs, seconds: float) -> bool:
    """Tell whether anything happened in between."""
    return (
        now.steps > before.steps
        or now.block_bytes > before.block_bytes
        or now.cpu_s - before.cpu_s > IDLE_SHARE * seconds
    )


def stalls(
    look: Callable[[], Signs], limit_s: float, over: threading.Event, pause_s: float
) -> bool:
    """Wait until nothing has moved for limit_s, or until it is over. True if it stalled."""
    last, since_s = look(), time.monotonic()
    while not over.wait(pause_s):
        now, now_s = look(), time.monotonic()
        if moved(last, now, now_s - since_s):
            last, since_s = now, now_s
        elif now_s - since_s >= limit_s:
            return True
    return False


@contextmanager
def watched(limit_s: float | None, events: EventLog) -> Iterator[None]:
    """Watch this process in the block; end it as `timeout` when nothing moves for limit_s."""
    if limit_s is None:
        yield
        return
    over = threading.Event()

    def watch() -> None:
        if stalls(lambda: signs(events), limit_s, over, limit_s / LOOKS):
            _end(limit_s, events)

    threading.Thread(target=watch, daemon=True, name="watchdog").start()
    try:
        yield
    finally:
        over.set()


def _end(limit_s: float, events: EventLog) -> None:
    """Write every thread's stack into the worker's log, say why, and end the process."""
    faulthandler.dump_traceback(file=sys.stderr, all_threads=True)
    sys.stderr.flush()
    main = sys._current_frames().get(threading.main_thread().ident or 0)
    stack = "".join(_lines(main))
    events.write(
        "failed",
        status="timeout",
        reason=(
            f"nothing moved for launcher.stall_s={limit_s:g}: no token, no byte from or to a disk, "
            f"no processor time. It waits in {_place(main)}"
        ),
        problems=[],
        traceback=stack,
    )
    os._exit(1)


def _lines(frame: object) -> list[str]:
    import traceback

    return traceback.format_stack(frame) if frame is not None else []  # type: ignore[arg-type]


def _place(frame: object) -> str:
    """Return the function and file that the main thread is in."""
    lines = _lines(frame)
    return " ".join(lines[-1].split("\n")[0].split()) if lines else "an unknown place"


def _block_bytes() -> int:
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return 0
    fields = dict(line.split(": ") for line in lines)
    return int(fields["read_bytes"]) + int(fields["write_bytes"])
