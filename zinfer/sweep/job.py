"""One job of a sweep, in whatever process its launcher runs it: reused, searched or run, and never raised from.

Hydra's launchers stop, or print their own text, when a job raises; what a job came to is in its folder, and the sweep's end reads it there.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.config.tasks import task_of
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.refusals import refusal
from zinfer.driver.run import finish, run_job
from zinfer.job.files import RESULT_FILE, REUSED_FILE
from zinfer.job.folder import read_json
from zinfer.job.outcome import Json
from zinfer.sweep.record import Sweep
from zinfer.sweep.resume import EarlierRun, note_reused
from zinfer.sweep.search import search_best_batch
from zinfer.sweep.table import SweepTerminal
from zinfer.tracking.job_key import key_here


def run_sweep_job(
    composed: DictConfig, sweep: Sweep, num: int, job_dir: Path, overrides: list[str]
) -> None:
    """The job's outcome is left in its folder: result.json, or reused.json where an earlier run stands for it."""
    if Interrupts.received or sweep.stopped():
        return
    terminal = SweepTerminal(sweep, num, overrides)
    try:
        config = parse_config(composed)
    except ConfigError as error:
        finish(refusal(error.problems, job_dir), job_dir, terminal)
    else:
        earlier = earlier_run(sweep, num, config)
        if earlier is not None:
            note_reused(earlier, job_dir)
            terminal.reused(earlier)
        elif config.sweep.search == "best_batch":
            search_best_batch(config, job_dir, terminal, sweep)
        else:
            forked = sweep.forked and config.launcher.fork_workers and task_of(config).loads_model
            run_job(
                config,
                job_dir,
                terminal,
                forked=forked,
                stopped=lambda: sweep.stopped() == "interrupted",
            )
    if sweep.fail_fast and not ended_well(
        read_json(job_dir / RESULT_FILE) or read_json(job_dir / REUSED_FILE)
    ):
        sweep.stop("fail_fast")


def ended_well(document: Json | None) -> bool:
    """Of a job's result.json or reused.json."""
    return document is not None and document["status"] in ("ok", "planned")


def earlier_run(sweep: Sweep, num: int, config: RunConfig) -> EarlierRun | None:
    """The run that stands for this job, by the key computed at the sweep's start; on another machine by the key that it has there."""
    if not sweep.reusable or config.sweep.search != "none":
        return None
    job = sweep.job(num)
    if sweep.local and job is not None:
        return sweep.reusable.get(str(job.key)) if job.state == "reused" else None
    return sweep.reusable.get(key_here(config))
