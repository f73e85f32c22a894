"""Report what a worker does: one JSON line per event, appended to JOB_DIR/events.jsonl.

The file outlives the worker. Whatever ended it, the driver finds the phases, samples and warnings
that it had got to. Every line names the attempt; readers leave out those of another one.
"""

from __future__ import annotations

import json
import os
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
COMPARED_BYTES = 256
"""More than the time and the attempt of a line: enough to know the place of reading again."""


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

    What happens to the file meanwhile costs no event: it stays open when it is deleted or another
    one takes its name (that one is read too), and it is read anew when it was cut short.
    """

    def __init__(self, job_dir: Path, attempt: str = "", name: str = EVENTS_FILE) -> None:
        self._path = job_dir / name
        self._attempt = attempt
        self._files: list[_Followed] = []
        self._seen: set[int] = set()
        """Hashes of the lines that were read: a file that is read anew repeats none."""

    @classmethod
    def made(cls, job_dir: Path, attempt: str) -> EventReader:
        """Make the file for the worker that will write it, and hold it open from now on.

        Raises:
            OSError: it cannot be made.
        """
        reader = cls(job_dir, attempt)
        reader._path.touch()
        reader._follow()
        return reader

    def new_events(self) -> Iterator[Event]:
        """Yield the attempt's events appended since the last call."""
        self._follow()
        for line in [line for followed in self._files for line in followed.new_lines()]:
            event = parsed_event(line)
            if event is None or event["attempt"] != self._attempt or hash(line) in self._seen:
                continue
            self._seen.add(hash(line))
            yield event

    def _follow(self) -> None:
        """Open the file if it is none of those that are open already."""
        try:
            found = self._path.stat()
            if not any(followed.is_file(found) for followed in self._files):
                self._files.append(_Followed(self._path.open("rb")))
        except OSError:
            return


class _Followed:
    """One file that grows, and the last line of it that is not complete yet."""

    def __init__(self, file: IO[bytes]) -> None:
        self._file = file
        self._rest = b""
        self._before = b""
        """The bytes before the place of reading. Where others stand there, the file was cut."""

    def is_file(self, found: os.stat_result) -> bool:
        return os.path.samestat(os.fstat(self._file.fileno()), found)

    def new_lines(self) -> list[bytes]:
        if not self._goes_on():
            self._file.seek(0)
            self._rest = self._before = b""
        read = self._file.read()
        self._before = (self._before + read)[-COMPARED_BYTES:]
        *lines, self._rest = (self._rest + read).split(b"\n")
        return lines

    def _goes_on(self) -> bool:
        start = self._file.tell() - len(self._before)
        return os.pread(self._file.fileno(), len(self._before), start) == self._before


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
