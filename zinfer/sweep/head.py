"""The head of a sweep: compose its jobs, look them up, plan them, show them, before any starts."""

from __future__ import annotations

import importlib
import os
import secrets
import shlex
import sys
import threading
import time
import traceback
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from omegaconf import DictConfig

from zinfer.config import ConfigError, RunConfig
from zinfer.config.tasks import task_of
from zinfer.driver.refusals import refusal
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.job.folder import attempt_in, is_driven
from zinfer.job.outcome import Outcome
from zinfer.sweep.board import Board
from zinfer.sweep.compose import (
    ComposedJob,
    compose_jobs,
    is_basic_sweeper,
    setting,
    sweep_folder,
    task_overrides,
)
from zinfer.sweep.decision import Decision, NoSweep, Planned, Previewed, Started
from zinfer.sweep.folders import make_folders, writable
from zinfer.sweep.launchers import (
    BASIC_LAUNCHER,
    ONE_PROCESS_LAUNCHERS,
    REMOTE_LAUNCHERS,
    require_launcher,
)
from zinfer.sweep.plan import plan_jobs
from zinfer.sweep.plan_grid import is_plan_grid, plan_grid
from zinfer.sweep.queue import queue_of, still_queued
from zinfer.sweep.record import SWEEP_VARIABLE, Sweep, SweepJob
from zinfer.sweep.resume import note_reused, reusable_runs, with_refusals_kept, with_reused
from zinfer.sweep.sweepers import direction_of, require_sweeper, trials_of
from zinfer.sweep.table import SPARE_OF_PLANS, plan_table, reasons
from zinfer.tracking.parent import ParentRunCallback
from zinfer.tracking.uri import tracking_uri
from zinfer.units import counted


def decide(master: DictConfig) -> Decision:
    """Start the sweep, or say why it does not start. Never raises an `Exception`."""
    output_format = str(setting(master, "format", "text"))
    try:
        return _decide(master, Terminal(output_format))
    except ConfigError as error:
        outcome = refusal(error.problems)
    except Exception as error:  # Hydra would print it as a warning and go on without a head
        outcome = Outcome(
            status="error",
            reason=f"the sweep did not start: {type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
        )
    return NoSweep(outcome=outcome, output_format=output_format)


def _decide(master: DictConfig, terminal: Terminal) -> Decision:
    sweep_folder(master)  # resolves ${now:...} once; Hydra copies the value to every job
    if is_plan_grid(master):
        return Planned(exit_code=plan_grid(master))
    require_launcher(str(master.hydra.launcher._target_))
    require_sweeper(master)
    terminal.note("composing the jobs of this sweep")
    composed = compose_jobs(master)
    configs, problems = checked(composed)
    sweep = described(master, composed, configs)
    if sweep.jobs is not None:
        sweep = with_problems(sweep, problems)
    sweep = looked_up(sweep, configs)
    if sweep.jobs is not None:
        to_plan = sum(job.state == "run" for job in sweep.jobs)
        if to_plan:
            terminal.note(f"planning {counted(to_plan, 'job')}")
        sweep = with_refusals_kept(with_plans(sweep, configs, terminal))
        if not sweep.preview or sweep.output_format == "text":
            show_plans(sweep, terminal)
        terminal.note(verdicts(sweep.jobs or []))
    if sweep.preview:
        return Previewed(sweep=sweep)
    return begin(sweep, master, configs, terminal)


def _text(value: object) -> str | None:
    return None if value is None else str(value)


def checked(
    composed: Sequence[ComposedJob],
) -> tuple[list[RunConfig | None], dict[int, list[str]]]:
    """Check every job. Returns the configurations, and the problems of those that have none."""
    configs: list[RunConfig | None] = []
    problems: dict[int, list[str]] = {}
    for job in composed:
        try:
            configs.append(job.checked())
        except ConfigError as error:
            configs.append(None)
            problems[job.num] = error.problems
    return configs, problems


def described(
    master: DictConfig, composed: Sequence[ComposedJob], configs: Sequence[RunConfig | None]
) -> Sweep:
    """Describe the sweep, with its jobs as far as they are known beforehand."""
    known = is_basic_sweeper(master)
    jobs = [
        SweepJob(
            num=job.num,
            overrides=job.overrides,
            folder=str(job.folder),
            task="run" if config is None else config.task,
        )
        for job, config in zip(composed, configs, strict=True)
    ]
    launcher = str(master.hydra.launcher._target_)
    first = next((config for config in configs if config is not None), None)
    uri = None
    if first is not None and first.tracking.store != "none":
        uri = tracking_uri(first.tracking, Path.cwd())
    return Sweep(
        folder=sweep_folder(master),
        attempt=secrets.token_hex(8),
        command=shlex.join(["zinfer", *sys.argv[1:]]),
        output_format=str(setting(master, "format", "text")),
        tracking_uri=uri,
        experiment=first.tracking.experiment if first is not None else "",
        resumes=uri is not None and first is not None and first.sweep.resume,
        retry=first.sweep.retry if first is not None else "failed",
        reuse_disturbed=first is not None and first.sweep.reuse_disturbed,
        fail_fast=first is not None and first.sweep.fail_fast,
        report=first is not None and first.sweep.report,
        preview=bool(setting(master, "sweep.preview", False)),
        local=not launcher.startswith(REMOTE_LAUNCHERS),
        in_process=launcher == BASIC_LAUNCHER,
        forked=launcher.startswith(ONE_PROCESS_LAUNCHERS) and (not known or len(jobs) > 1),
        queue=queue_of(launcher, _text(setting(master, "hydra.launcher.submitit_folder", None))),
        direction=direction_of(master),
        objective=str(setting(master, "sweep.objective", "")),
        started_s=time.time(),
        pid=os.getpid(),
        jobs=jobs if known else None,
        trials=None if known else trials_of(master),
        fixed=[] if known else [text.partition("=")[0] for text in composed[0].overrides],
    )


def show_plans(sweep: Sweep, terminal: Terminal) -> None:
    """Show the table of the jobs, and why some will be refused. A preview's is its result."""
    terminal.table(plan_table(sweep), SPARE_OF_PLANS, to_out=sweep.preview)
    for line in reasons((job.num, job.reason) for job in sweep.jobs or []):
        terminal.line(line, to_out=sweep.preview)


def verdicts(jobs: Sequence[SweepJob]) -> str:
    """Say how many jobs will run, how many are reused, and how many will be refused."""
    reused = sum(job.state == "reused" for job in jobs)
    runs = [job for job in jobs if job.state != "reused"]
    refused = sum(job.verdict in ("does_not_fit", "refused") for job in runs)
    said = [f"{len(runs) - refused} of {counted(len(jobs), 'job')} will run"]
    said += [f"{reused} reused"] if reused else []
    said += [f"{refused} will be refused"] if refused else []
    return ", ".join(said)


def with_problems(sweep: Sweep, problems: dict[int, list[str]]) -> Sweep:
    """Mark the jobs whose configuration cannot run: each is refused alone when it is its turn."""
    jobs = [
        replace(job, state="refused", verdict="refused", reason="; ".join(problems[job.num]))
        if job.num in problems
        else job
        for job in sweep.jobs or []
    ]
    return replace(sweep, jobs=jobs)


def looked_up(sweep: Sweep, configs: Sequence[RunConfig | None]) -> Sweep:
    """Find the earlier runs that may stand for its jobs, with one query."""
    first = next((config for config in configs if config is not None), None)
    if first is None or not sweep.resumes or sweep.tracking_uri is None:
        return sweep
    reusable = reusable_runs(
        sweep.tracking_uri,
        sweep.experiment,
        retry=sweep.retry,
        reuse_disturbed=sweep.reuse_disturbed,
    )
    if first.sweep.search != "none":  # a search's trials are looked up one by one
        return replace(sweep, reusable=reusable)
    return with_reused(sweep, configs, reusable)


def with_plans(sweep: Sweep, configs: Sequence[RunConfig | None], terminal: Terminal) -> Sweep:
    """Add the memory plan's verdict on every job that will run."""
    wanted = {
        job.num: config
        for job, config in zip(sweep.jobs or [], configs, strict=True)
        if job.state == "run" and config is not None
    }
    plans = dict(zip(wanted, plan_jobs(list(wanted.values()), terminal), strict=True))
    jobs = [
        replace(
            job,
            verdict=plans[job.num].verdict,
            reason=plans[job.num].reason,
            needed_bytes=plans[job.num].needed_bytes,
            generations=plans[job.num].generations,
            predicted_s=plans[job.num].predicted_s,
            work_bytes=plans[job.num].work_bytes,
        )
        if job.num in plans
        else job
        for job in sweep.jobs or []
    ]
    return replace(sweep, jobs=jobs)


def begin(
    sweep: Sweep,
    master: DictConfig,
    configs: Sequence[RunConfig | None],
    terminal: Terminal,
) -> Started:
    """Take the sweep's folder, write the record, and prepare what the first job needs.

    Raises:
        ConfigError: the folder cannot be made, or another sweep works in it.
    """
    held = take_folder(sweep)
    os.environ[SWEEP_VARIABLE] = str(sweep.folder)
    left = None
    if sweep.jobs is not None:
        left = sum(job.state != "reused" for job in sweep.jobs)
    parent = ParentRunCallback()
    if left == 0:
        for job in sweep.jobs or []:
            folder = Path(job.folder)
            sweep.begin_job(job.num, folder, job.overrides)
            note_reused(sweep.reusable[str(job.key)], folder)
    if sweep.tracking_uri is not None:
        parent.announce(sweep.folder, task_overrides(master.hydra), sweep.tracking_uri)
    if left != 0:
        prepare(sweep, configs, terminal)
    board = Board.of(sweep) if left != 0 else None
    return Started(sweep=sweep, parent=parent, held=held, board=board, left=left)


def take_folder(sweep: Sweep) -> ExitStack:
    """Make the folders of the sweep and of its jobs, and hold the sweep's until the stack closes.

    Raises:
        ConfigError: they cannot be made, or another sweep works there, or jobs of one that ended.
    """
    if is_driven(sweep.folder):
        raise ConfigError(
            [
                f"hydra.sweep.dir={sweep.folder} is in use by a sweep that still runs. "
                "Wait for its end, or set hydra.sweep.dir to another folder"
            ]
        )
    left = None if sweep.queue is None else still_queued(sweep.queue)
    if left is not None:
        raise ConfigError(
            [f"hydra.sweep.dir={sweep.folder} is that of a sweep that was started before: {left}"]
        )
    jobs = [Path(job.folder) for job in sweep.jobs or []]
    make_folders(sweep.folder, *jobs)
    with ExitStack() as held, writable(sweep.folder):
        held.enter_context(attempt_in(sweep.folder, "sweep", jobs))
        sweep.write()
        return held.pop_all()


def prepare(sweep: Sweep, configs: Sequence[RunConfig | None], terminal: Terminal) -> None:
    """Start the workers' imports, and MLflow's, beside Hydra's composing of the first job."""
    runs = (config for config in configs if config is not None and task_of(config).loads_model)
    first = next(runs, None)
    if sweep.forked and first is not None and first.launcher.fork_workers:
        terminal.note("importing torch, transformers and DeepSpeed once for all jobs")
        Servers.prepare(first)
        if sweep.tracking_uri is not None and sweep.in_process:
            threading.Thread(target=importlib.import_module, args=("mlflow",), daemon=True).start()
