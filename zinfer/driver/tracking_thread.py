"""The job's MLflow run, opened beside the worker's imports and closed after its end."""

from __future__ import annotations

import contextlib
import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import RunConfig
from zinfer.config.tasks import task_of
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.orphans import close_abandoned
from zinfer.driver.terminal import Terminal
from zinfer.job.files import DRIVER_READY_FILE, ENVIRONMENT_FILE, NOT_LOGGED_FILE
from zinfer.job.folder import end_of
from zinfer.job.outcome import Outcome
from zinfer.job.records import write_json
from zinfer.job.unsent import note_unsent
from zinfer.machine.environment import environment
from zinfer.redact import redact
from zinfer.tracking.deadline import within
from zinfer.tracking.run import TrackingUnavailable, open_run

if TYPE_CHECKING:
    from zinfer.tracking.run import TrackedRun
    from zinfer.tracking.system_metrics import SystemMetrics


class TrackingThread:
    """Opens the run beside the worker's imports.

    The worker starts timing when this is done, so that MLflow's import never shares a core with a
    sample. Then the thread closes runs of drivers that were killed, for some seconds at most.
    """

    def __init__(self, config: RunConfig, job_dir: Path, attempt: str, terminal: Terminal) -> None:
        self.attempt = attempt
        self._environment: dict[str, Any] | None = None
        self._config = config
        self._job_dir = job_dir
        self._terminal = terminal
        self._run: TrackedRun | None = None
        self._system: SystemMetrics | None = None
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread = threading.Thread(target=self._open, daemon=True)
        self._thread.start()

    def _open(self) -> None:
        try:
            nvme_path = self._config.offload.nvme_path
            self._environment = environment(self._config, Path(nvme_path) if nvme_path else None)
            with contextlib.suppress(OSError):  # the folder is gone or full: finish() says so
                write_json(self._job_dir / ENVIRONMENT_FILE, self._environment)
            self._run = self._bounded(
                lambda: open_run(
                    self._config,
                    job_dir=self._job_dir,
                    environment=self._environment or {},
                    attempt=self.attempt,
                )
            )
            if self._config.tracking.system_metrics:
                self._sample_machine()
            if task_of(self._config).loads_model:
                close_abandoned(self._terminal)
        except TrackingUnavailable as error:
            self._problem = str(error)
        except Exception as error:  # in a thread it would be lost, and the run with it
            self._problem = f"{type(error).__name__}: {error}"
        finally:
            with contextlib.suppress(OSError):  # the folder was deleted: finish() says so
                (self._job_dir / DRIVER_READY_FILE).touch()

    def _sample_machine(self) -> None:
        """Sample the machine's load from now on. What prevents it is said, and the run goes on."""
        run = self._run
        if run is None or run.run_id is None or run.uri is None:
            return
        from zinfer.tracking.system_metrics import SystemMetrics

        try:
            self._system = SystemMetrics(run.run_id, run.uri)
            self._system.start()
        except Exception as error:  # each monitor raises its own
            self._system = None
            self._terminal.warning(f"no system metrics: {type(error).__name__}: {error}")

    def _bounded(self, call: Any) -> Any:
        """Call the store, for tracking.timeout_s at most, and not beyond the second Ctrl-C."""
        tracking = self._config.tracking
        store = redact(tracking.uri or "the run store")
        return within(tracking.timeout_s, call, store, Interrupts.has_insisted)

    def finish(self, outcome: Outcome) -> Outcome:
        """Log the outcome and end the run.

        What cannot be logged stays in the job folder for `zinfer task=upload`, and is said.
        """
        if self._thread is not None:
            self._thread.join()  # each of its steps has a deadline
        outcome = replace(outcome, environment=self._environment)
        system = self._system.stop() if self._system is not None else []
        run = self._run
        if run is not None:
            outcome = replace(outcome, run_id=run.run_id, run_page=run.page)
            try:
                self._bounded(lambda: run.finish(outcome, system))
            except TrackingUnavailable as error:
                self._problem = str(error)
        if self._problem is not None:
            self._leave_for_upload(redact(self._problem), outcome)
        return outcome

    def _leave_for_upload(self, problem: str, outcome: Outcome) -> None:
        try:
            left = {"problem": problem, "run_id": outcome.run_id}
            write_json(self._job_dir / NOT_LOGGED_FILE, left)
            note_unsent(self._job_dir)
        except OSError as error:
            why = end_of(self._job_dir).problem or f"{self._job_dir}: {error.strerror}"
            self._terminal.warning(
                f"not logged to MLflow: {problem}. Nor can it be sent later: {why}"
            )
            return
        self._terminal.warning(
            f"not logged to MLflow: {problem}. Its files are in {self._job_dir}; "
            "to send them: zinfer task=upload"
        )
