"""The command `zinfer`: compose with Hydra, check, and do the task.

Imports nothing heavy, so that `--help` and refusals take well under a second. Exit codes: 0 done;
2 the configuration or the machine does not allow it; 1 it failed; 130 interrupted.
"""

from __future__ import annotations

import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from zinfer.config.command_line import (
    argument_problems,
    is_completion,
    may_choose_mode,
    normalised,
    wants_json,
)
from zinfer.driver.interrupts import Interrupts
from zinfer.job.outcome import INTERRUPTED, Outcome
from zinfer.output import open_output
from zinfer.paths import conf_dir
from zinfer.sweep.decision import DECIDED, LeaveHydra, Started
from zinfer.tracking.deadline import LeftBehind

if TYPE_CHECKING:
    from hydra.conf import HydraConf
    from omegaconf import DictConfig

FULL_ERROR = "HYDRA_FULL_ERROR"


class Ended:
    """End of the job of this process, kept here: Hydra gives a task's return value to nobody."""

    outcome: ClassVar[Outcome | None] = None
    composed = False


def task(composed: DictConfig) -> float | None:
    """Do one job, single or of a sweep.

    In a sweep it never raises: how the job ended is in its folder, under every launcher.

    Returns:
        The job's sweep.objective, for a sweeper that searches. None where the job has none.
    """
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    Ended.composed = True
    Interrupts.install()  # some launchers run this in processes of their own
    context = HydraConfig.get()
    job_dir = Path(context.runtime.output_dir)
    redact_what_hydra_wrote(composed, context, job_dir)
    if context.mode != RunMode.MULTIRUN:
        settings = OmegaConf.to_container(context.overrides.task, resolve=False)
        assert isinstance(settings, list)
        Ended.outcome = run_single(composed, job_dir, [str(setting) for setting in settings])
        return None
    from zinfer.sweep.compose import task_overrides
    from zinfer.sweep.job import run_sweep_job
    from zinfer.sweep.record import started_here, sweep_of_job

    sweep = sweep_of_job(str(context.sweep.dir))
    if sweep is None:
        end_without_sweep(composed, job_dir)
        return None
    objective = run_sweep_job(
        composed, sweep, int(context.job.num), job_dir, task_overrides(context)
    )
    if Interrupts.received and started_here(sweep):
        raise KeyboardInterrupt
    hand_on_signals()
    return objective


def hand_on_signals() -> None:
    """Let the launcher requeue the job that it wanted to end, now that it has ended in order."""
    try:
        Interrupts.hand_on()
    except Exception as error:
        print(f"the launcher does not run this job again: {error}", file=sys.stderr)


def end_without_sweep(composed: DictConfig, job_dir: Path) -> None:
    """End a job in another process than its sweep's, whose record was deleted meanwhile."""
    from zinfer.driver.finishing import finish
    from zinfer.driver.terminal import Terminal

    outcome = Outcome(
        status="error",
        reason="the folder of the sweep was deleted while it ran. Leave it alone until the sweep "
        "has ended, and type the command again",
        job_dir=str(job_dir),
    )
    finish(outcome, job_dir, Terminal(format_of(composed), name=job_dir.name))


def run_single(composed: DictConfig, job_dir: Path, settings: list[str]) -> Outcome:
    """Check one composed configuration and do its task.

    Args:
        settings: overrides as they were typed.
    """
    from zinfer.config import ConfigError, parse_config
    from zinfer.config.tasks import task_of
    from zinfer.config.unread import unread_settings
    from zinfer.driver.finishing import do_task, finish
    from zinfer.driver.refusals import refusal
    from zinfer.driver.terminal import Terminal

    terminal = Terminal(format_of(composed))
    try:
        config = parse_config(composed)
    except ConfigError as error:
        return finish(refusal(error.problems, job_dir), job_dir, terminal)
    from zinfer.driver.label import job_label

    terminal.name = job_label(config.model.name, settings, config.task)
    for warning in unread_settings(config, settings):
        terminal.warning(warning)
    if task_of(config).takes_search and config.sweep.search == "best_batch":
        from zinfer.sweep.search import search_best_batch

        return search_best_batch(config, job_dir, terminal)
    return do_task(config, job_dir, terminal)


def format_of(composed: DictConfig) -> str:
    """Return `format`, also of an unchecked tree: text where it says nothing readable."""
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    try:
        return "json" if OmegaConf.select(composed, "format") == "json" else "text"
    except OmegaConfBaseException:
        return "text"


def redact_what_hydra_wrote(composed: DictConfig, context: HydraConf, job_dir: Path) -> None:
    """Take secrets out of what Hydra wrote down of the command, as out of our own files."""
    from hydra.types import RunMode
    from omegaconf import OmegaConf

    from zinfer.job.left_files import redact_hydra
    from zinfer.redact import hide_named

    hide_named(OmegaConf.to_container(composed, resolve=False))
    hide_named(OmegaConf.to_container(context.overrides.task, resolve=False))
    if context.output_subdir is not None:
        redact_hydra(sorted((job_dir / context.output_subdir).glob("*.yaml")))
    if context.mode == RunMode.MULTIRUN:
        redact_hydra([Path(str(context.sweep.dir)) / "multirun.yaml"])


def main() -> None:
    """Run the console script."""
    output = open_output()
    code = command(sys.argv[1:])
    LeftBehind.exit(output.close(code))


def command(arguments: list[str]) -> int:
    """Do what was typed. Returns the exit code."""
    if arguments[:1] == ["report"]:
        from multirun_analysis.__main__ import main as report

        sys.argv = ["zinfer-report", *arguments[1:]]
        return exit_code_of(report)
    if "--version" in arguments:
        from zinfer import __version__

        print(f"zinfer {__version__}")
        return 0
    if arguments[:1] == ["--explain"]:
        return explain_settings(arguments[1:])
    if is_completion(arguments):
        from zinfer.config.completion import answer

        if answer():
            return 0
    sys.argv[1:] = arguments = normalised(arguments)
    if problems := argument_problems(arguments):
        return refuse(problems, arguments)
    return compose_and_run(arguments)


def compose_and_run(arguments: list[str]) -> int:
    """Let Hydra compose and call `task`, once or for each job of a sweep."""
    import hydra

    run = hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(task)
    Interrupts.install()
    interrupted, code = False, 0
    wanted = os.environ.get(FULL_ERROR)
    os.environ[FULL_ERROR] = "1"  # Hydra then raises, and the words are ours
    try:
        with composing_once(arguments):
            run()
    except KeyboardInterrupt:
        interrupted, code = True, INTERRUPTED
    except LeaveHydra:
        pass  # the head of the sweep left nothing to run
    except SystemExit as exit_:  # --help
        code = exit_.code if isinstance(exit_.code, int) else 0
    except Exception as error:
        if isinstance(DECIDED.get(), Started) and wanted != "1":
            print(launcher_stopped(error), file=sys.stderr)
            return end_of_sweep(interrupted=False) or 1
        from zinfer.config.hydra_errors import composition_problems

        problems = None if wanted == "1" else composition_problems(error, arguments)
        if problems is None or Ended.outcome is not None:
            print(redacted(traceback.format_exc()), file=sys.stderr)
            code = 1
        elif isinstance(DECIDED.get(), Started):  # the sweep's own document comes below
            print(redacted("; ".join(problems)), file=sys.stderr)
            code = 1
        else:
            code = refuse(problems, arguments)
    if DECIDED.get() is not None:
        return end_of_sweep(interrupted=interrupted) or code
    return Ended.outcome.exit_code if Ended.outcome is not None else code


@contextmanager
def composing_once(arguments: list[str]) -> Iterator[None]:
    """Spare Hydra the trial that composes everything only to read hydra.mode, where none is set.

    It takes a fifth of the time in which a configuration is refused.
    """
    from hydra._internal.hydra import Hydra

    own = Hydra.get_mode
    if not may_choose_mode(arguments):
        Hydra.get_mode = lambda *_, **__: None  # type: ignore[method-assign]
    try:
        yield
    finally:
        Hydra.get_mode = own  # type: ignore[method-assign]


def end_of_sweep(*, interrupted: bool) -> int:
    """End what the head of the sweep has decided, and return the exit code."""
    from zinfer.sweep.end import end

    decision = DECIDED.get()
    assert decision is not None, "only a sweep has a head"
    return end(decision, interrupted=interrupted)


def launcher_stopped(error: Exception) -> str:
    """Return in one line why the launcher or sweeper of a sweep gave up: no job raises."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    said = ": ".join([type(error).__name__, *lines[:1]])[:400]
    return f"the sweep's launcher or sweeper stopped: {said} (all of it: {FULL_ERROR}=1)"


def redacted(text: str) -> str:
    """Return the text without secrets; the rules for them are loaded only here."""
    from zinfer.redact import redact

    return redact(text)


def refuse(problems: list[str], arguments: list[str]) -> int:
    """Show why nothing was composed, as one document under format=json."""
    from zinfer.driver.refusals import refusal
    from zinfer.driver.terminal import Terminal

    outcome = refusal(problems)
    Terminal("json" if wants_json(arguments) else "text").finish(outcome)
    return outcome.exit_code


def explain_settings(names: list[str]) -> int:
    """Print what each of these settings or groups is."""
    from zinfer.config.explain import explain, overview

    try:
        print("\n\n".join(explain(name) for name in names) if names else overview())
    except ValueError as error:
        return refuse([str(error)], names)
    return 0


def exit_code_of(program: object) -> int:
    """Run another console script's main, which ends by SystemExit or by returning."""
    assert callable(program)
    try:
        result = program()
    except SystemExit as exit_:
        return exit_.code if isinstance(exit_.code, int) else int(exit_.code is not None)
    return result if isinstance(result, int) else 0


if __name__ == "__main__":
    main()
