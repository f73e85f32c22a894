"""Show a job: a live table while it runs, a table at its end. With format=json, one document.

The result goes to stdout and everything else to stderr. Where stderr is no terminal, a log gets
one line for each phase.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar, TextIO

from zinfer.driver.screen import Screen
from zinfer.job.events import Event
from zinfer.job.outcome import Outcome
from zinfer.output import is_live
from zinfer.redact import redact

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

    from zinfer.driver.progress import JobProgress, Phase

REDRAW_S = 1.0
"""Between two frames where nothing happened; a frame costs the driver some milliseconds."""
PIPE_WIDTH = 140
"""Characters of a table's line where the output is no terminal."""


class Terminal:
    """Writes the result to stdout and the rest to stderr; live only where that is a terminal."""

    _said: ClassVar[set[str]] = set()
    """Subjects of which every job of a sweep would say the same."""
    among_others: ClassVar[bool] = False
    """Its lines stand among those of other jobs, so a warning names its job."""
    line_after_s: ClassVar[float] = 0.0
    """A log gets the line of a phase when it has lasted so long."""

    def __init__(
        self,
        output_format: str,
        *,
        name: str = "",
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._json = output_format == "json"
        self.name = name
        """Label of the job: its model and the settings that differ."""
        self._out = out or sys.stdout
        self.err = err or sys.stderr
        self._live = is_live(self.err)
        self._progress: JobProgress | None = None
        self._logs_phases = False
        self._logged: Phase | None = None
        self._drawn_s = 0.0

    @property
    def live(self) -> bool:
        """Return whether a live table is drawn, so that no other progress need be shown."""
        return self._live

    def begin(self, coming: Sequence[str], *, logs_phases: bool) -> None:
        """Prepare for a job's events.

        Args:
            coming: the phases that it will go through.
            logs_phases: write a line for each where nothing is drawn; never with format=json.
        """
        from zinfer.driver.progress import JobProgress

        self._progress = JobProgress(self.name, coming)
        self._logs_phases = logs_phases and not self._live and not self._json

    def phase(self, name: str) -> None:
        """Show that the driver itself begins a phase."""
        self.event({"event": "phase", "name": name, "time_s": time.time()})

    def share(self, done: float, total: float, unit: str) -> None:
        """Show how far the driver's phase is."""
        progress = {"event": "progress", "done": done, "total": total, "unit": unit}
        self.event({**progress, "time_s": time.time()})

    def event(self, event: Event) -> None:
        """Show what a worker reported."""
        if self._progress is None:
            self.begin((), logs_phases=False)
        assert self._progress is not None
        self._progress.take(event)
        if event["event"] == "warning":
            self.warning(event["message"])
        self.tick(force=event["event"] in ("phase", "sample"))

    def tick(self, *, force: bool = False) -> None:
        """Draw anew, or write the line of a phase that is worth one."""
        if self._progress is None:
            return
        now_s = time.time()
        if self._live:
            if force or not 0.0 <= now_s - self._drawn_s < REDRAW_S:
                self._drawn_s = now_s
                Screen.show(self.err, self.frame(self._progress, now_s))
        elif self._logs_phases:
            self._log_phase(self._progress, now_s)

    def frame(self, progress: JobProgress, now_s: float) -> RenderableType:
        """Return what is drawn while the job runs."""
        from zinfer.driver.frames import JobFrame

        return JobFrame(progress, now_s)

    def _log_phase(self, progress: JobProgress, now_s: float) -> None:
        from zinfer.driver.progress import phase_line

        phase = progress.current
        if phase is None or phase is self._logged or phase.elapsed_s(now_s) < self.line_after_s:
            return
        self._logged = phase
        self.note(phase_line(self.name, phase, now_s, progress.seconds_left(now_s)))

    def note(self, message: str) -> None:
        """Print one line for people."""
        Screen.print_line(self.err, redact(message))

    def note_once(self, message: str, *, about: str) -> None:
        """Print one line for people, where this process has not said one about this yet."""
        if about not in self._said:
            self._said.add(about)
            self.note(message)

    def warning(self, message: str, *, about: str | None = None) -> None:
        """Print one line for people, marked as a warning; among other jobs, of which one.

        Args:
            about: its subject, where this process says it once only.
        """
        of_job = f"{self.name}: " if self.among_others and self.name else ""
        said = f"warning: {of_job}{message}"
        if about is None:
            self.note(said)
        else:
            self.note_once(said, about=about)

    def line(self, text: str, *, to_out: bool) -> None:
        """Print a line of a sweep's table: on stdout where it is a result."""
        if to_out and not self._json:
            print(redact(text), file=self._out)
        else:
            self.note(text)

    def close(self) -> None:
        """Erase what is drawn: nothing more changes, or others write now."""
        Screen.close()

    def finish(self, outcome: Outcome) -> None:
        """Show the end of a job: its table, or its document."""
        Screen.close()
        if self._json:
            print(json.dumps(redact(outcome.document())), file=self._out, flush=True)
            return
        if outcome.status == "refused":
            for problem in outcome.problems:
                print(redact(f"refused: {problem}"), file=self.err, flush=True)
            return
        self._show_result(outcome)
        if outcome.job_dir:
            self.note(
                f"job folder {outcome.job_dir}"
                + (f", MLflow run {outcome.run_id}" if outcome.run_id else "")
            )
        if outcome.run_page:
            self.note(f"to see it: {outcome.run_page}")

    def _show_result(self, outcome: Outcome) -> None:
        """Print tables, verdict and plan, as far as the job has got to them."""
        from zinfer.driver.tables import plan_table, result_table
        from zinfer.plan.page import page, verdict_line

        if outcome.plan is not None:
            self._print(plan_table(outcome), ("made of", "available"))
        if "timed_runs" in outcome.metrics:
            self._print(result_table(outcome), ("standard deviation", "max", "min"))
            if verdict := verdict_line(outcome):
                print(verdict, file=self._out)
        if outcome.status not in ("ok", "planned"):
            self.note(f"{outcome.status}: {outcome.reason}")
        if outcome.status == "planned":
            assert outcome.plan is not None
            print(*map(redact, page(outcome)), sep="\n", file=self._out)
            print("DeepSpeed JSON:", file=self._out)
            print(json.dumps(redact(outcome.deepspeed), indent=2), file=self._out)

    def _print(self, table: Table, spare: Sequence[str] = (), *, to_out: bool = True) -> None:
        from rich.console import Console

        from zinfer.driver.tables import fit, hide_secrets

        file = self._out if to_out else self.err
        width = None if file.isatty() else PIPE_WIDTH
        console = Console(file=file, width=width, highlight=False)
        hide_secrets(table)  # before it is cut into lines
        fit(table, spare, console)
        console.print(table)

    def table(self, table: Table, spare: Sequence[str] = (), *, to_out: bool = True) -> None:
        """Print a table of a sweep: the result on stdout, everything else on stderr.

        Args:
            spare: heads of the columns that are left out, in this order, until it fits.
        """
        Screen.close()
        self._print(table, spare, to_out=to_out and not self._json)
