"""The job's MLflow run, opened beside the worker's imports and closed after its end."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import RunConfig
from zinfer.driver.terminal import Terminal
from zinfer.job.files import DRIVER_READY_FILE, ENVIRONMENT_FILE, NOT_LOGGED_FILE
from zinfer.job.folder import write_json
from zinfer.job.outcome import Outcome
from zinfer.machine.environment import environment
from zinfer.redact import redact
from zinfer.tracking.run import TrackingUnavailable, open_run

if TYPE_CHECKING:
    from zinfer.tracking.run import TrackedRun


class TrackingThread:
    """Opens the run; the worker starts timing when it is done, so that MLflow's import never shares a core with a sample."""

    def __init__(self, config: RunConfig, job_dir: Path) -> None:
        self.environment: dict[str, Any] | None = None
        self._config = config
        self._job_dir = job_dir
        self._run: TrackedRun | None = None
        self._problem: str | None = None
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin; returns at once."""
        self._thread = threading.Thread(target=self._open)
        self._thread.start()

    def _open(self) -> None:
        try:
            self.environment = environment(self._config, self._config.offload.nvme_folder)
            write_json(self._job_dir / ENVIRONMENT_FILE, self.environment)
            self._run = open_run(self._config, job_dir=self._job_dir, environment=self.environment)
        except TrackingUnavailable as error:
            self._problem = str(error)
        except Exception as error:  # in a thread it would be lost, and the run with it
            self._problem = f"{type(error).__name__}: {error}"
        finally:
            (self._job_dir / DRIVER_READY_FILE).touch()

    def wait(self) -> None:
        """Until the opening is over, however it went."""
        if self._thread is not None:
            self._thread.join()

    def finish(self, outcome: Outcome, terminal: Terminal) -> Outcome:
        """Log the outcome and end the run. What cannot be logged stays in the job folder for `zinfer task=upload`, and is said."""
        self.wait()
        if self._run is not None:
            outcome = replace(outcome, run_id=self._run.run_id)
            try:
                self._run.finish(outcome)
            except TrackingUnavailable as error:
                self._problem = str(error)
        if self._problem is not None:
            write_json(
                self._job_dir / NOT_LOGGED_FILE,
                {"problem": redact(self._problem), "run_id": outcome.run_id},
            )
            terminal.warning(
                f"not logged to MLflow: {self._problem}. Its files are in {self._job_dir}; to send them: zinfer task=upload"
            )
        return outcome
