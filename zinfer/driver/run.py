"""One job: check it against this machine, start its worker, watch it, and end it truthfully whatever happened.

The driver imports neither torch nor transformers nor deepspeed. The isolation is here, in the job, so it holds under every launcher.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

from zinfer.config import ConfigError, RunConfig
from zinfer.config.tasks import task_of
from zinfer.driver.ending import Circumstances, Watched, disk_free_bytes, oom_kills, outcome_of
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.orphans import close_abandoned
from zinfer.driver.refusals import refusal, require_possible
from zinfer.driver.terminal import Terminal
from zinfer.driver.tracking_thread import TrackingThread
from zinfer.driver.workers import Servers, Worker, start_worker
from zinfer.job.events import EventReader
from zinfer.job.files import RESULT_FILE, WORKERS_FILE
from zinfer.job.folder import driven, write_job, write_json
from zinfer.job.outcome import EndedBy, Outcome
from zinfer.job.swap import (
    claim_swap_folder,
    process_start_ticks,
    remove_orphaned_swap_folders,
    remove_swap_folder,
)
from zinfer.machine import native_ops
from zinfer.machine.hardware import detect_hardware

POLL_S = 0.25
"""Between two looks at the worker's events; its end is seen at once."""


def never() -> bool:
    """For jobs that nobody else can stop."""
    return False


def run_job(
    config: RunConfig,
    job_dir: Path,
    terminal: Terminal,
    *,
    forked: bool = False,
    stopped: Callable[[], bool] = never,
) -> Outcome:
    """Run one job to whatever end. Writes JOB_DIR/result.json; never raises for what the job did.

    Args:
        forked: take the worker from a server that holds its imports; worth it when more jobs follow.
        stopped: asked four times a second; True ends the job as Ctrl-C does.
    """
    job_dir.mkdir(parents=True, exist_ok=True)
    with Interrupts.in_order(), driven(job_dir, "job"):
        close_abandoned(terminal)
        try:
            hardware = detect_hardware(
                config.hardware, config.offload.nvme_folder, config.launcher.ranks
            )
            require_possible(config, hardware, terminal)
        except (ConfigError, ValueError) as error:
            problems = error.problems if isinstance(error, ConfigError) else [str(error)]
            return finish(refusal(problems, job_dir), job_dir, terminal)
        tracked = TrackingThread(config, job_dir)
        outcome = run_worker(config, job_dir, terminal, tracked, forked=forked, stopped=stopped)
        tracked.wait()
        outcome = replace(outcome, job_dir=str(job_dir), environment=tracked.environment)
        outcome = tracked.finish(outcome, terminal)
        return finish(outcome, job_dir, terminal)


def finish(outcome: Outcome, job_dir: Path, terminal: Terminal) -> Outcome:
    """Store the result beside the job and show it."""
    try:
        write_json(job_dir / RESULT_FILE, outcome.document())
    except OSError as error:
        terminal.warning(f"{job_dir / RESULT_FILE} was not written: {error}")
    terminal.finish(outcome)
    return outcome


def run_worker(
    config: RunConfig,
    job_dir: Path,
    terminal: Terminal,
    tracked: TrackingThread,
    *,
    forked: bool,
    stopped: Callable[[], bool],
) -> Outcome:
    """Start the worker, watch it, and say how it ended. Leaves no process and no swap file."""
    ooms_before = oom_kills()
    watched, reader = Watched(), EventReader(job_dir)
    ended_by, swap_free = EndedBy.ITSELF, None
    try:
        with (
            swap_folder_of(config, job_dir, terminal) as swap,
            worker_of(config, job_dir, terminal, forked=forked) as worker,
        ):
            tracked.start()  # beside the worker's imports, not after the run
            ended_by = watch(worker, config, reader, watched, terminal, stopped)
            swap_free = disk_free_bytes(swap) if swap is not None else None
    except KeyboardInterrupt:  # before there was a worker
        return Outcome(
            status="killed",
            reason="interrupted before the worker started",
            ended_by=EndedBy.INTERRUPTED,
        )
    except (OSError, RuntimeError) as error:
        return Outcome(status="error", reason=f"{type(error).__name__}: {error}")
    for event in reader.new_events():  # written between the last look and the end
        watched.take(event)
    seen = Circumstances(
        ended_by=ended_by, oom_kills=oom_kills() - ooms_before, swap_free_bytes=swap_free
    )
    return outcome_of(config, job_dir, watched, worker, seen)


@contextmanager
def swap_folder_of(config: RunConfig, job_dir: Path, terminal: Terminal) -> Iterator[Path | None]:
    """The job's swap folder while it runs; gone afterwards, whatever happened."""
    if not task_of(config).uses_swap or config.offload.device != "nvme":
        yield None
        return
    assert config.offload.nvme_path is not None, "config_problems refuses nvme without a path"
    for folder in remove_orphaned_swap_folders(config.offload.nvme_path):
        terminal.note(f"removed {folder}, left by a job whose driver was killed")
    swap = claim_swap_folder(config.offload.nvme_path, job_dir)
    try:
        yield swap
    finally:
        remove_swap_folder(swap)


@contextmanager
def worker_of(
    config: RunConfig, job_dir: Path, terminal: Terminal, *, forked: bool
) -> Iterator[Worker]:
    """The job's worker processes; they and all that they started are gone afterwards."""
    if task_of(config).loads_ops:
        _build_ops(config, terminal)
    write_job(job_dir, config)
    server = Servers.ready(config, lambda: Interrupts.received) if forked else None
    worker = start_worker(config, job_dir, server)
    try:
        with contextlib.suppress(OSError):
            pids = [
                {"pid": rank.pid, "start_ticks": process_start_ticks(rank.pid)}
                for rank in worker.ranks
            ]
            write_json(job_dir / WORKERS_FILE, pids)
        yield worker
    finally:
        worker.end()


def _build_ops(config: RunConfig, terminal: Terminal) -> None:
    """Compile what this run loads, apart from the run and said so. Raises RuntimeError when it cannot be built."""
    ops = native_ops.ops_of(config)
    for message in native_ops.remove_stale_locks(ops):
        terminal.note(message)
    with Interrupts.at_once():  # minutes, the first time on a machine
        native_ops.build(ops, echo=terminal.note)


def watch(
    worker: Worker,
    config: RunConfig,
    reader: EventReader,
    watched: Watched,
    terminal: Terminal,
    stopped: Callable[[], bool],
) -> EndedBy:
    """Take the worker's events until it ends, and return who ended it."""
    deadline_s = (
        None if config.launcher.timeout_s is None else time.monotonic() + config.launcher.timeout_s
    )
    while True:
        over = worker.wait(POLL_S)
        for event in reader.new_events():
            watched.take(event)
            terminal.event(event)
        if over:
            return EndedBy.ITSELF
        if Interrupts.received or stopped():
            return EndedBy.INTERRUPTED
        if deadline_s is not None and time.monotonic() > deadline_s:
            return EndedBy.TIMEOUT
        terminal.tick()
