"""Report what a worker does: one JSON line per event, appended to JOB_DIR/events.jsonl.

The file outlives the worker. Whatever ended it, the driver finds the phases, samples and warnings
that it had got to. Every line names the attempt; readers leave out those of another one.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, get_args

from zinfer.job.files import EVENTS_FILE, RANK_EVENTS_FILE
from zinfer.job.outcome import Status

Event = dict[str, Any]

NUMBER = (int, float)
FIELDS: dict[str, dict[str, Any]] = {
    "planned": {"model": dict, "plan": dict, "deepspeed": dict},
    "phase": {"name": str},
    "progress": {"done": NUMBER, "total": NUMBER, "unit": str},
    "sample": {
        "kind": str,
        "index": int,
        "prefill_s": NUMBER,
        "decode_step_s": list,
        "total_s": NUMBER,
    },
    "warning": {"message": str},
    "generated": {},
    "result": {"status": str, "metrics": dict},
    "failed": {"status": str, "reason": str, "problems": list},
}
"""Event -> the fields that readers use, with their types."""


class EventLog:
    """Appends events; each line is flushed at once. Ranks other than 0 keep a file of their own."""

    def __init__(self, job_dir: Path, rank: int = 0, attempt: str = "") -> None:
        name = EVENTS_FILE if rank == 0 else RANK_EVENTS_FILE.format(rank=rank)
        self._file = (job_dir / name).open("a", encoding="utf-8")
        self._attempt = attempt
        self.rank = rank
        self.written = 0

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; `time_s` is seconds since the epoch."""
        head = {"time_s": round(time.time(), 4), "attempt": self._attempt, "event": event}
        self._file.write(json.dumps({**head, **fields}) + "\n")
        self._file.flush()
        self.written += 1

    def phase(self, name: str, **fields: Any) -> None:
        """Say that a new phase began: plan, load, warm-up, timed generation."""
        self.write("phase", name=name, **fields)

    def progress(self, done: float, total: float, unit: str) -> None:
        """Say how far the current phase is."""
        self.write("progress", done=done, total=total, unit=unit)

    def warning(self, message: str) -> None:
        """Say something that a person should know of this run."""
        self.write("warning", message=message)


class EventReader:
    """Reads events as they arrive; a half-written last line is left for the next call.

    The file stays open from its first event on: a folder that is deleted meanwhile costs nothing.
    """

    def __init__(self, job_dir: Path, attempt: str = "", name: str = EVENTS_FILE) -> None:
        self._path = job_dir / name
        self._attempt = attempt
        self._file: IO[bytes] | None = None
        self._rest = b""

    def new_events(self) -> Iterator[Event]:
        """Yield the attempt's events appended since the last call."""
        if self._file is None:
            try:
                self._file = self._path.open("rb")
            except OSError:
                return
        *lines, self._rest = (self._rest + self._file.read()).split(b"\n")
        for line in lines:
            event = parsed_event(line)
            if event is not None and event["attempt"] == self._attempt:
                yield event


def parsed_event(line: bytes) -> Event | None:
    """Return the event of one line, or None for what is not one: nobody's word is believed."""
    try:
        event = json.loads(line)
    except ValueError:
        return None
    if not isinstance(event, dict) or not isinstance(event.get("attempt"), str):
        return None
    wanted = FIELDS.get(str(event.get("event")), {})
    if not isinstance(event.get("event"), str) or not isinstance(event.get("time_s"), NUMBER):
        return None
    if any(not isinstance(event.get(name), kind) for name, kind in wanted.items()):
        return None
    if "status" in wanted and event["status"] not in get_args(Status):
        return None
    numbers = [*event["metrics"].values()] if "metrics" in wanted else []
    numbers += event["decode_step_s"] if "decode_step_s" in wanted else []
    return event if all(isinstance(number, NUMBER) for number in numbers) else None
