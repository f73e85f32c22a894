"""See how far a sweep is: what ended, how, and how long it took."""

from __future__ import annotations

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from zinfer.job.events import parsed_event
from zinfer.job.files import EVENTS_FILE, RESULT_FILE
from zinfer.job.outcome import Json
from zinfer.sweep.record import JobFolder, Sweep, SweepJob, ended_well
from zinfer.sweep.time_left import TimedJob, seconds_left
from zinfer.units import counted, format_left, format_roughly


@dataclass(frozen=True, kw_only=True)
class EndedJob:
    """A job of this attempt that came to an end."""

    num: int
    document: Json
    started_s: float | None
    """First event of its worker; None where it had none."""
    ended_s: float


@dataclass
class Pace:
    """Tells how far a sweep is. Each result is read once, however often it is asked."""

    sweep: Sweep
    ended: dict[int, EndedJob] = field(default_factory=dict)

    def look(self) -> list[JobFolder]:
        """Read what has ended since the last look; return the jobs that run."""
        running = []
        for job in self.sweep.begun():
            if job.num in self.ended:
                continue
            document = job.document()
            if document is None:
                running.append(job)
            else:
                self.ended[job.num] = _ended(job, document)
        return running

    @property
    def total(self) -> int | None:
        """Return the number of jobs, or of a search's trials; None where nobody knows it."""
        return self.sweep.trials if self.sweep.jobs is None else len(self.sweep.jobs)

    @property
    def failed(self) -> int:
        """Return how many did not end well."""
        return sum(not ended_well(job.document) for job in self.ended.values())

    def seconds_left(self, running: Sequence[JobFolder], now_s: float) -> float | None:
        """Return the time until the last job ends; None while it cannot be known."""
        if self.sweep.jobs is None:
            return self._seconds_of_trials(now_s)
        nums = {job.num for job in running}
        known = {job.num: job for job in self.sweep.jobs if _takes_time(job)}
        waiting = [job for num, job in known.items() if num not in self.ended and num not in nums]
        return seconds_left(
            [job.size for job in waiting],
            list(self._timed(known)),
            running=[
                (known[job.num].size, now_s - (first_event_s(job.folder) or now_s))
                for job in running
                if job.num in known
            ],
            gap_s=self._gap_s(),
        )

    def _seconds_of_trials(self, now_s: float) -> float | None:
        """Return the time left of a search whose trials nobody knows, at the pace of the others.

        Those that were refused or failed count: as many of those to come will be. Reused ones
        say nothing.
        """
        here = [job for job in self.ended.values() if not job.document.get("reused")]
        starts = [job.started_s for job in here if job.started_s is not None]
        if self.total is None or not starts:
            return None
        last_s = max(job.ended_s for job in here)
        each_s = (last_s - min(starts)) / len(here)
        return max(0.0, (self.total - len(self.ended)) * each_s - (now_s - last_s))

    def _timed(self, known: dict[int, SweepJob]) -> Iterator[TimedJob]:
        """Yield the jobs that ended well by running, with their times."""
        for num, job in self.ended.items():
            if num in known and job.started_s is not None and ended_well(job.document):
                seconds = job.ended_s - job.started_s
                metrics = job.document.get("metrics") or {}
                generations = known[num].generations
                part_s = float(metrics.get("total_s", 0.0)) * generations
                if "search_trials" in metrics:
                    part_s = seconds
                yield TimedJob(
                    size=known[num].size, seconds=seconds, generation_s=min(part_s, seconds)
                )

    def _gap_s(self) -> float:
        """Return the usual time from one job's end to the next one's first event."""
        times = sorted(
            (job.started_s, job.ended_s) for job in self.ended.values() if job.started_s is not None
        )
        gaps = [max(0.0, after[0] - before[1]) for before, after in itertools.pairwise(times)]
        return statistics.median(gaps) if gaps else 0.0

    def said(self, left_s: float | None, now_s: float | None = None) -> str:
        """Say it in one line: '3 of 12 jobs done, 1 failed, 2 minutes so far, about 4 ... left'."""
        of = "" if self.total is None else f" of {self.total}"
        noun = counted(self.total or len(self.ended), "job").partition(" ")[2]
        return ", ".join([f"{len(self.ended)}{of} {noun} done", *self.parts(left_s, now_s)])

    def parts(self, left_s: float | None, now_s: float | None = None) -> list[str]:
        """Say what failed, the time so far and the time left, as far as they are known."""
        now_s = time.time() if now_s is None else now_s
        parts = [f"{self.failed} failed"] if self.failed else []
        parts.append(f"{format_roughly(max(0.0, now_s - self.sweep.started_s))} so far")
        if left_s is not None and len(self.ended) != self.total:
            parts.append(format_left(left_s))
        return parts


def _takes_time(job: SweepJob) -> bool:
    """Return whether it will run: no earlier run stands for it, and nothing refuses it."""
    return job.state == "run" and job.verdict in ("fits", "unknown")


def _ended(job: JobFolder, document: Json) -> EndedJob:
    try:
        ended_s = (job.folder / RESULT_FILE).stat().st_mtime
    except OSError:  # it is reused, or its folder is gone
        ended_s = time.time()
    started_s = None if document.get("reused") else first_event_s(job.folder)
    return EndedJob(num=job.num, document=document, started_s=started_s, ended_s=ended_s)


def first_event_s(folder: Path) -> float | None:
    """Return when the worker of this folder reported its first event; None: not yet."""
    try:
        with (folder / EVENTS_FILE).open("rb") as file:
            event = parsed_event(file.readline())
    except OSError:
        return None
    return None if event is None else float(event["time_s"])
