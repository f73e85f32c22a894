"""One job of a sweep, in whatever process its launcher runs it: reused, searched or run, and never raised from.

Hydra's launchers stop, or print their own text, when a job raises; what a job came to is in its folder, and the sweep's end reads it there.
"""

from __future__ import annotations

from pathlib import Path

from omegaconf import DictConfig

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.driver import finish, run_job
from zinfer.environment import environment
from zinfer.interrupts import Interrupts
from zinfer.job import RESULT_FILE, REUSED_FILE, read_json, write_json
from zinfer.outcome import Json
from zinfer.refusals import refusal
from zinfer.sweep import Sweep
from zinfer.sweep_resume import EarlierRun, job_key
from zinfer.sweep_table import SweepTerminal


def run_sweep_job(composed: DictConfig, sweep: Sweep, num: int, job_dir: Path, overrides: list[str]) -> None:
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
            note_reused(sweep, earlier, job_dir, overrides)
            terminal.reused(earlier)
        elif config.sweep.search == "best_batch":
            from zinfer.sweep_search import search_best_batch

            search_best_batch(config, job_dir, terminal, sweep)
        else:
            forked = sweep.forked and config.launcher.fork_workers and config.task == "run"
            run_job(config, job_dir, terminal, forked=forked, stopped=lambda: sweep.stopped() == "interrupted")
    if sweep.fail_fast and not ended_well(read_json(job_dir / RESULT_FILE) or read_json(job_dir / REUSED_FILE)):
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


def key_here(config: RunConfig) -> str:
    """The job's key on this machine."""
    nvme_path = Path(config.offload.nvme_path) if config.offload.nvme_path else None
    return job_key(config, environment(config, nvme_path))


def note_reused(sweep: Sweep, earlier: EarlierRun, job_dir: Path, overrides: list[str]) -> None:
    """Leave in the job's folder which run stands for it, with all that is known of that run."""
    job_dir.mkdir(parents=True, exist_ok=True)
    document: Json = {"status": earlier.status, "reason": earlier.reason, "run_id": earlier.run_id, "job_dir": earlier.job_dir}
    if earlier.tokens_per_s is not None:
        document["metrics"] = {"generated_tokens_per_s": earlier.tokens_per_s}
    if earlier.job_dir is not None:
        document |= read_json(Path(earlier.job_dir) / RESULT_FILE) or {}
    write_json(job_dir / REUSED_FILE, {**document, "reused": True, "run_id": earlier.run_id})
