"""Hydra's entry: compose, check, dispatch the task. Imports nothing heavy: `--help` and refusals take well under a second."""

from __future__ import annotations

import contextlib
import io
import json
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, TextIO

import hydra
from hydra.errors import HydraException

from zinfer.outcome import INTERRUPTED, Outcome

if TYPE_CHECKING:
    from omegaconf import DictConfig


class JobFailed(HydraException):
    """One job of a sweep did not end well: every launcher goes on with the others, and the sweep's exit code is 1."""


def conf_dir() -> str:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError("conf/config.yaml is neither inside the zinfer package nor beside it")


class Ended:
    """What the jobs of this process came to; Hydra gives a task's return value to nobody."""

    outcomes: ClassVar[list[Outcome]] = []
    composed = False


def task(composed: DictConfig) -> None:
    """One job, single or of a sweep."""
    from hydra.core.hydra_config import HydraConfig
    from hydra.types import RunMode

    Ended.composed = True
    context = HydraConfig.get()
    sweep = context.mode == RunMode.MULTIRUN
    outcome = run_composed(composed, Path(context.runtime.output_dir), sweep=sweep)
    Ended.outcomes.append(outcome)
    if sweep and outcome.exit_code == INTERRUPTED:
        raise KeyboardInterrupt
    if sweep and outcome.exit_code:
        raise JobFailed(f"job {context.job.num} ({' '.join(context.overrides.task)}): {outcome.status}: {outcome.reason}")


def run_composed(composed: DictConfig, job_dir: Path, *, sweep: bool) -> Outcome:
    """Check one composed configuration and run its task."""
    from omegaconf import OmegaConf

    from zinfer.config import ConfigError, parse_config
    from zinfer.terminal import Terminal

    output_format = str(OmegaConf.select(composed, "format"))
    out = sys.stderr if sweep and output_format == "json" else sys.stdout
    terminal = Terminal(output_format, name=job_dir.name, out=out)
    try:
        config = parse_config(composed)
    except ConfigError as error:
        from zinfer.driver import finish, refusal

        return finish(refusal(error.problems, job_dir), job_dir, terminal)
    from zinfer.driver import run_job

    return run_job(config, job_dir, terminal)


def main() -> None:
    """The console script. Exit codes: 0 done; 2 the configuration or the machine does not allow it; 1 it failed; 130 interrupted."""
    wants_json = "format=json" in sys.argv
    sys.argv[1:] = multirun_first(sys.argv[1:])
    said = io.StringIO()
    compose_and_run = hydra.main(version_base="1.3", config_path=conf_dir(), config_name="config")(task)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # ends a job in order, as Ctrl-C does
    try:
        with contextlib.redirect_stderr(Tee(sys.stderr, said)):
            compose_and_run()
    except KeyboardInterrupt:
        sys.exit(INTERRUPTED)
    except SystemExit as exit_:
        if exit_.code and not Ended.composed:  # Hydra could not compose what was typed
            if wants_json:
                problems = [line for line in said.getvalue().splitlines() if line and "HYDRA_FULL_ERROR" not in line]
                print(json.dumps({"status": "refused", "problems": [" ".join(problems)]}))
            sys.exit(2)
        raise
    sys.exit(max((outcome.exit_code for outcome in Ended.outcomes), default=0))


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
        return self._stream.write(text)

    def flush(self) -> None:
        self._stream.flush()

    def isatty(self) -> bool:
        return self._stream.isatty()

    def fileno(self) -> int:
        return self._stream.fileno()


if __name__ == "__main__":
    main()
