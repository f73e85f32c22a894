"""Run one job of a sweep, in whatever process its launcher runs it: reused, searched or run.

It never raises: Hydra's launchers stop, or print their own text, when a job does. What a job came
to is in its folder, and the sweep's end reads it there.
"""

from __future__ import annotations

import traceback
from pathlib import Path

from omegaconf import DictConfig

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.config.tasks import task_of
from zinfer.driver.finishing import do_task, finish
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.refusals import refusal
from zinfer.job.files import PARENT_FILE
from zinfer.job.outcome import Json, Outcome
from zinfer.sweep.compose import problems_of_interpolation, setting
from zinfer.sweep.earlier_runs import EarlierRun
from zinfer.sweep.record import JobFolder, Sweep, ended_well
from zinfer.sweep.resume import note_reused, stands_now
from zinfer.sweep.search import search_best_batch
from zinfer.sweep.sweepers import objective_of
from zinfer.sweep.terminal import SweepTerminal, sweep_label
from zinfer.tracking.job_key import key_here


def run_sweep_job(
    composed: DictConfig, sweep: Sweep, num: int, job_dir: Path, overrides: list[str]
) -> float | None:
    """Leave the job's outcome in its folder: result.json, or reused.json for an earlier run.

    Returns:
        Its sweep.objective; None where it has not ended well, or has no such metric.
    """
    if Interrupts.received or sweep.stopped():
        return None
    label = sweep_label(sweep, str(setting(composed, "model.name", "")), overrides)
    job = sweep.begin_job(num, job_dir, overrides, label)
    terminal = SweepTerminal(sweep, job)
    try:
        document = _run(composed, sweep, job, terminal)
    except ConfigError as error:
        document = finish(refusal(error.problems, job_dir), job_dir, terminal).document()
    except Exception as error:
        outcome = Outcome(
            status="error",
            reason=f"{type(error).__name__}: {error}",
            traceback=traceback.format_exc(),
            job_dir=str(job_dir),
        )
        document = finish(outcome, job_dir, terminal).document()
    sweep.end_job(job, document)
    if sweep.fail_fast and not ended_well(job.document()):
        sweep.stop("fail_fast")
    return objective_of(job.document(), sweep.objective)


def _run(composed: DictConfig, sweep: Sweep, job: JobFolder, terminal: SweepTerminal) -> Json:
    """Reuse, search or run. Returns the job's result document."""
    with problems_of_interpolation():
        config = with_parent(parse_config(composed), sweep)
    earlier = earlier_run(sweep, job.num, config)
    if earlier is not None:
        document = note_reused(earlier, job.folder)
        terminal.reused(earlier)
        return document
    if config.sweep.search == "best_batch":
        return search_best_batch(config, job.folder, terminal, sweep).document()
    forked = sweep.forked and config.launcher.fork_workers and task_of(config).loads_model
    outcome = do_task(
        config,
        job.folder,
        terminal,
        forked=forked,
        stopped=lambda: sweep.stopped() == "interrupted",
    )
    return outcome.document()


def with_parent(config: RunConfig, sweep: Sweep) -> RunConfig:
    """Put the job under the sweep's run, also where the launcher passed no environment on."""
    parent = sweep.folder / PARENT_FILE
    if config.sweep.parent_run_id is not None or not parent.is_file():
        return config
    return config.changed(sweep={"parent_run_id": str(parent)})


def earlier_run(sweep: Sweep, num: int, config: RunConfig) -> EarlierRun | None:
    """Return the run that stands for this job.

    On this machine the head has decided it. On another one the job has the key of that machine,
    and a run that did not fit stands where the job does not fit there either.
    """
    if not sweep.reusable or config.sweep.search != "none":
        return None
    job = sweep.job(num)
    if sweep.local and job is not None:
        return sweep.reusable.get(str(job.key)) if job.state == "reused" else None
    found = sweep.reusable.get(key_here(config))
    return found if found is not None and stands_now(found, config) else None
