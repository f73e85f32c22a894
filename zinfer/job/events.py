"""What a worker reports while it runs: one JSON line per event, appended to JOB_DIR/events.jsonl.

The file outlives the worker: whatever ended it, the driver finds the phases, samples and warnings that it had got to.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from zinfer.job.files import EVENTS_FILE, RANK_EVENTS_FILE

Event = dict[str, Any]


class EventLog:
    """Appends events; each line is flushed at once. Ranks other than 0 keep a file of their own."""

    def __init__(self, job_dir: Path, rank: int = 0) -> None:
        name = EVENTS_FILE if rank == 0 else RANK_EVENTS_FILE.format(rank=rank)
        self._file = (job_dir / name).open("a", encoding="utf-8")
        self.rank = rank

    def write(self, event: str, **fields: Any) -> None:
        """Append one event; `time_s` is seconds since the epoch."""
        self._file.write(
            json.dumps({"time_s": round(time.time(), 4), "event": event, **fields}) + "\n"
        )
        self._file.flush()

    def phase(self, name: str, **fields: Any) -> None:
        """A new phase began: plan, load, warm-up, timed generation."""
        self.write("phase", name=name, **fields)

    def progress(self, done: float, total: float, unit: str) -> None:
        """How far the current phase is."""
        self.write("progress", done=done, total=total, unit=unit)

    def warning(self, message: str) -> None:
        """Something that a person should know of this run."""
        self.write("warning", message=message)


class EventReader:
    """Reads events as they arrive; a half-written last line is left for the next call."""

    def __init__(self, job_dir: Path) -> None:
        self._path = job_dir / EVENTS_FILE
        self._offset = 0

    def new_events(self) -> Iterator[Event]:
        """Events appended since the last call."""
        try:
            with self._path.open("rb") as file:
                file.seek(self._offset)
                appended = file.read()
        except FileNotFoundError:
            return
        complete = appended.rfind(b"\n") + 1
        self._offset += complete
        for line in appended[:complete].splitlines():
            yield json.loads(line)
