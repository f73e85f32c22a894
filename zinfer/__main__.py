"""Hydra's entry: compose, check, dispatch the task. Imports nothing heavy: `--help` and refusals take well under a second."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

import hydra

from zinfer.driver.interrupts import Interrupts
from zinfer.job.outcome import INTERRUPTED, Outcome
from zinfer.paths import conf_dir
from zinfer.sweep.decision import DECIDED, LeaveHydra
from zinfer.tracking.deadline import LeftBehind

if TYPE_CHECKING:
    from omegaconf import DictConfig


class Ended:
    """What the job of this process came to; Hydra gives a task's return value to nobody."""

    outcome: ClassVar[Outcome | None] = None
    composed = False


def task(composed: DictConfig) -> None:
    """One job, single or of a sweep. In a sweep it never raises: what it came to is in its folder, under every launcher."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    Ended.composed = True
    Interrupts.install()  # some launchers run this in processes of their own
    context = HydraConfig.get()
    job_dir = Path(context.runtime.output_dir)
    if context.mode != RunMode.MULTIRUN:
        Ended.outcome = run_single(composed, job_dir)
        return
    from zinfer.sweep.compose import task_overrides
    from zinfer.sweep.job import run_sweep_job
    from zinfer.sweep.record import started_here, sweep_of_job

    sweep = sweep_of_job(str(context.sweep.dir))
    assert sweep is not None, "the head of a sweep writes sweep.json before the first job"
    run_sweep_job(composed, sweep, int(context.job.num), job_dir, task_overrides(context))
    if Interrupts.received and started_here(sweep):
        raise KeyboardInterrupt


def run_single(composed: DictConfig, job_dir: Path) -> Outcome:
    """Check one composed configuration and run its task."""
    from omegaconf import OmegaConf

    from zinfer.config import ConfigError, parse_config
    from zinfer.config.tasks import function_named, task_of
    from zinfer.driver.refusals import refusal
    from zinfer.driver.run import finish, in_use
    from zinfer.driver.terminal import Terminal
    from zinfer.job.folder import FolderInUse, attempt_in

    terminal = Terminal(str(OmegaConf.select(composed, "format")), name=job_dir.name)
    try:
        config = parse_config(composed)
    except ConfigError as error:
        return finish(refusal(error.problems, job_dir), job_dir, terminal)
    task_row = task_of(config)
    if task_row.takes_search and config.sweep.search == "best_batch":
        from zinfer.sweep.search import search_best_batch

        return search_best_batch(config, job_dir, terminal)
    try:
        with attempt_in(job_dir):
            outcome: Outcome = function_named(task_row.command)(config, job_dir, terminal)
    except FolderInUse as error:
        return in_use(error, job_dir, terminal)
    return outcome


def main() -> None:
    """The console script. Exit codes: 0 done; 2 the configuration or the machine does not allow it; 1 it failed; 130 interrupted."""
    wants_json = "format=json" in sys.argv
    sys.argv[1:] = multirun_first(sys.argv[1:])
    said = io.StringIO()
    compose_and_run = hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(
        task
    )
    Interrupts.install()
    interrupted, code = False, 0
    try:
        with contextlib.redirect_stderr(Tee(sys.stderr, said)):
            compose_and_run()
    except KeyboardInterrupt:
        interrupted, code = True, INTERRUPTED
    except LeaveHydra:
        pass  # the head of the sweep left nothing to run
    except SystemExit as exit_:  # Hydra's own, after a failure
        code = exit_.code if isinstance(exit_.code, int) else 0
    decision = DECIDED.get()
    if decision is not None:
        from zinfer.sweep.end import end

        LeftBehind.exit(end(decision, interrupted=interrupted) or code)
    if code and not (Ended.composed or interrupted):  # Hydra could not compose what was typed
        if wants_json:
            problems = [
                line
                for line in said.getvalue().splitlines()
                if line and "HYDRA_FULL_ERROR" not in line
            ]
            print(json.dumps({"status": "refused", "problems": [" ".join(problems)]}))
        sys.exit(2)
    LeftBehind.exit(Ended.outcome.exit_code if Ended.outcome is not None else code)


def multirun_first(arguments: list[str]) -> list[str]:
    """Hydra takes -m only as the first argument; people type it anywhere."""
    flags = [argument for argument in arguments if argument in ("-m", "--multirun")]
    return flags[:1] + [argument for argument in arguments if argument not in ("-m", "--multirun")]


class Tee(io.TextIOBase):
    """Writes to a stream and keeps a copy until the first job is composed."""

    def __init__(self, stream: TextIO, copy: io.StringIO) -> None:
        self._stream, self._copy = stream, copy

    def write(self, text: str) -> int:
        if not Ended.composed:
            self._copy.write(text)
        if (
            "HYDRA_FULL_ERROR=1" in text
        ):  # Hydra's hint at a stack trace: of what the user typed there is none worth reading
            return len(text)
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


if __name__ == "__main__":
    main()
