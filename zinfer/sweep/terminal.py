"""Show a job of a sweep: the live table while it runs, and one line when it has ended.

Jobs in other processes than the sweep's draw nothing. Where they share its terminal, they leave
their lines in a file, and the sweep's board prints them.
"""

from __future__ import annotations

import sys
import time
from typing import TYPE_CHECKING, ClassVar

from zinfer.driver.label import job_label
from zinfer.driver.screen import Screen
from zinfer.driver.terminal import Terminal
from zinfer.job.files import JOBS_FOLDER
from zinfer.job.outcome import Outcome
from zinfer.output import is_live
from zinfer.sweep.earlier_runs import EarlierRun
from zinfer.sweep.pace import Pace
from zinfer.sweep.record import SAID_FILE, JobFolder, Sweep, started_here
from zinfer.sweep.table import reason_of

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zinfer.driver.progress import JobProgress

LOGGED_AFTER_S = 10.0


def sweep_label(sweep: Sweep, model: str, overrides: list[str]) -> str:
    """Name a job by its model and by what differs from the sweep's other jobs."""
    return job_label(model, sweep.varying(overrides))


class SweepTerminal(Terminal):
    """Shows one job. A log gets the line of a phase only if the phase lasts."""

    among_others: ClassVar[bool] = True
    line_after_s: ClassVar[float] = LOGGED_AFTER_S
    _paces: ClassVar[dict[str, Pace]] = {}
    """The sweep of this process: what it has read stays read."""

    def __init__(self, sweep: Sweep, job: JobFolder) -> None:
        err = None
        if not sweep.in_process and not started_here(sweep) and is_live(sys.stderr):
            said = sweep.folder / JOBS_FOLDER / SAID_FILE
            err = said.open("a", buffering=1)  # it is open as long as the job
        super().__init__(sweep.output_format, name=job.label, err=err)
        self._live = self._live and sweep.in_process
        self._pace = self._paces.setdefault(sweep.attempt, Pace(sweep))
        self._job = job
        self._began_s = time.time()
        self._left_s: float | None = None
        if self._live:
            self._pace.look()
            self._left_s = self._pace.seconds_left([job], self._began_s)

    def frame(self, progress: JobProgress, now_s: float) -> RenderableType:
        """Return the job's phases below a line on the sweep."""
        from zinfer.driver.frames import JobFrame

        left_s = self._left_s
        if left_s is not None:
            left_s = max(0.0, left_s - (now_s - self._began_s))
        return JobFrame(progress, now_s, head=self._pace.said(left_s, now_s))

    def finish(self, outcome: Outcome) -> None:
        """Show the job's one line."""
        rate = outcome.metrics.get("generated_tokens_per_s")
        said = outcome.status if rate is None else f"{rate:.4g} tokens/s"
        if outcome.status not in ("ok", "planned"):
            said += f": {reason_of(outcome.document())}"
        self._line_of_job(said)

    def reused(self, earlier: EarlierRun) -> None:
        """Show the line of a job that needs no run."""
        rate = "" if earlier.tokens_per_s is None else f"{earlier.tokens_per_s:.4g} tokens/s, "
        status = "" if earlier.ended_well else f"{earlier.status}, "
        self._line_of_job(f"{rate}{status}reused from run {earlier.run_id}")

    def _line_of_job(self, said: str) -> None:
        pace, now_s = self._pace, time.time()
        running = pace.look()
        left_s = pace.seconds_left(running, now_s)
        done = f"{len(pace.ended)}/{pace.total}" if pace.total else f"{len(pace.ended)}"
        how_far = ", ".join(pace.parts(left_s, now_s))
        self.note(f"[{done}] {self.name}: {said}  ({how_far})")
        if self._live:
            from zinfer.driver.frames import line

            Screen.show(self.err, line(pace.said(left_s, now_s), style="bold"))
