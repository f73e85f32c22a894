"""Draw a sweep whose jobs run in other processes: their event logs say how far they are.

The process that started the sweep waits for them, under joblib on this machine, under Slurm on
others. It has the only terminal, so a thread of it draws one table of all jobs that run.
"""

from __future__ import annotations

import sys
import threading
import time
from typing import TextIO

from zinfer.driver.progress import START, JobProgress
from zinfer.driver.screen import Screen
from zinfer.job.events import EventReader
from zinfer.job.files import JOBS_FOLDER
from zinfer.job.folder import read_job
from zinfer.output import is_live
from zinfer.sweep.pace import Pace
from zinfer.sweep.record import SAID_FILE, JobFolder, Sweep

LOOK_S = 1.0


class Board:
    """The sweep's table, redrawn once a second until it is closed."""

    def __init__(self, sweep: Sweep, stream: TextIO) -> None:
        self._stream = stream
        self._pace = Pace(sweep)
        self._followed: dict[int, Followed] = {}
        self._said = sweep.folder / JOBS_FOLDER / SAID_FILE
        self._said_bytes = self._said.stat().st_size if self._said.exists() else 0
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    @classmethod
    def of(cls, sweep: Sweep) -> Board | None:
        """Return the board of a sweep that needs one: jobs elsewhere, and a terminal here."""
        if sweep.in_process or not is_live(sys.stderr):
            return None
        return cls(sweep, sys.stderr)

    def close(self) -> None:
        """Print what is left to say, and erase the table."""
        self._closed.set()
        self._thread.join()
        self.print_said()
        Screen.close()

    def _watch(self) -> None:
        while not self._closed.wait(LOOK_S):
            self.print_said()
            self.draw(time.time())

    def draw(self, now_s: float) -> None:
        """Read what the jobs reported, and draw it."""
        from zinfer.driver.frames import JobsFrame

        running = self._pace.look()
        shown = tuple(self._progress_of(job) for job in running)
        head = self._pace.said(self._pace.seconds_left(running, now_s), now_s)
        Screen.show(self._stream, JobsFrame(shown, now_s, head=head))

    def print_said(self) -> None:
        """Print the lines that jobs of this machine have left since the last look."""
        try:
            with self._said.open(encoding="utf-8", errors="replace") as file:
                file.seek(self._said_bytes)
                lines = file.readlines()
        except OSError:
            return
        for line in lines:
            if line.endswith("\n"):
                self._said_bytes += len(line.encode())
                Screen.print_line(self._stream, line.rstrip("\n"))

    def _progress_of(self, job: JobFolder) -> JobProgress:
        if job.num not in self._followed:
            self._followed[job.num] = Followed(job)
        return self._followed[job.num].look()


class Followed:
    """One job, read from its folder."""

    def __init__(self, job: JobFolder) -> None:
        self._job = job
        self._progress = JobProgress(job.label)
        self._progress.take({"event": "phase", "name": START, "time_s": time.time()})
        self._reader: EventReader | None = None

    def look(self) -> JobProgress:
        """Take what the job reported since the last look."""
        if self._reader is None and (record := read_job(self._job.folder)) is not None:
            self._reader = EventReader(self._job.folder, record.attempt)
        for event in self._reader.new_events() if self._reader is not None else ():
            self._progress.take(event)
        return self._progress
