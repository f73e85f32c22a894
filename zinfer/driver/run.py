"""One job: check it, start its worker, watch it, and end it truthfully whatever happened.

The driver imports neither torch nor transformers nor deepspeed. The isolation is here, in the job,
so it holds under every launcher.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from zinfer.config import ConfigError, RunConfig
from zinfer.config.tasks import task_of
from zinfer.driver.disks import describe_disk
from zinfer.driver.ending import (
    Circumstances,
    Watched,
    disk_free_bytes,
    folder_cause,
    oom_kills,
    outcome_of,
)
from zinfer.driver.finishing import finish, in_use
from zinfer.driver.interrupts import SIGNALS, WARNINGS, Interrupts
from zinfer.driver.progress import LOG, START, coming_phases
from zinfer.driver.refusals import refusal, require_possible
from zinfer.driver.terminal import Terminal
from zinfer.driver.tracking_thread import TrackingThread
from zinfer.driver.workers import Servers, Worker, start_worker
from zinfer.job.events import EventReader
from zinfer.job.files import WORKERS_FILE
from zinfer.job.folder import FolderInUse, attempt_in, end_of, write_job
from zinfer.job.outcome import EndedBy, Outcome
from zinfer.job.processes import process_start_ticks
from zinfer.job.records import write_json
from zinfer.job.swap import (
    claimed_swap_folder,
    remove_orphaned_swap_folders,
    remove_swap_folder,
)
from zinfer.machine import cpp_library, gpu, native_ops
from zinfer.machine.hardware import detect_hardware
from zinfer.tracking.deadline import never
from zinfer.tracking.uri import URI_VARIABLE, resolved_tracking

POLL_S = 0.25
"""Between two looks at the worker's events. Its end is seen at once."""


COMMON_SIGNALS = (*SIGNALS, *WARNINGS)
"""Signals that a batch system sends to driver and worker alike, in any order."""
COMMON_S = 1.0
"""After the worker died of one: time for the driver's own to come."""


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
        forked: take the worker from a server that holds its imports; for jobs that others follow.
        stopped: asked four times a second; True ends the job as Ctrl-C does.
    """
    try:
        with Interrupts.in_order(), attempt_in(job_dir) as attempt:
            return run_attempt(config, job_dir, attempt, terminal, forked=forked, stopped=stopped)
    except FolderInUse as error:
        return in_use(error, job_dir, terminal)


def run_attempt(
    config: RunConfig,
    job_dir: Path,
    attempt: str,
    terminal: Terminal,
    *,
    forked: bool,
    stopped: Callable[[], bool],
) -> Outcome:
    """Run one attempt at the job, in a folder that is this process's own."""
    config = with_store(config, terminal)
    try:
        hardware = detect_hardware(
            config.hardware, config.offload.nvme_folder, config.launcher.ranks
        )
        require_possible(config, hardware, terminal, job_dir)
    except (ConfigError, ValueError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        return finish(refusal(problems, job_dir), job_dir, terminal)
    terminal.begin(coming_phases(config), logs_phases=task_of(config).loads_model)
    terminal.phase(START)
    tracked = TrackingThread(config, job_dir, attempt, terminal)
    outcome = run_worker(config, job_dir, terminal, tracked, forked=forked, stopped=stopped)
    outcome = replace(outcome, job_dir=str(job_dir))
    if config.tracking.store != "none":
        terminal.phase(LOG)
    return finish(tracked.finish(outcome), job_dir, terminal)


def with_store(config: RunConfig, terminal: Terminal) -> RunConfig:
    """Decide tracking=auto. What comes from the environment is stored as coming from there."""

    def say(message: str) -> None:
        terminal.note_once(message, about=URI_VARIABLE)

    tracking = resolved_tracking(config.tracking, say)
    if tracking.uri == config.tracking.uri:
        return replace(config, tracking=tracking)
    text = f"${{oc.env:{URI_VARIABLE}}}"
    texts = {**config.from_environment, ("tracking", "uri"): text}
    return replace(config, tracking=tracking, from_environment=texts)


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
    attempt = tracked.attempt
    watched = Watched(attempt=attempt)
    ended_by, swap_free = EndedBy.ITSELF, None
    try:
        reader = EventReader.made(job_dir, attempt)
        if task_of(config).loads_ops:
            _build_ops(config, terminal)
        deadline = Deadline.after(config.launcher.timeout_s)
        with (
            swap_folder_of(config, job_dir, attempt, terminal, watched) as swap,
            worker_of(config, job_dir, attempt, terminal, deadline if forked else None) as worker,
        ):
            tracked.start()  # beside the worker's imports, not after the run
            ended_by = watch(worker, deadline, reader, watched, terminal, stopped)
            swap_free = disk_free_bytes(swap) if swap is not None else None
    except KeyboardInterrupt:  # before there was a worker
        return Outcome(
            status="killed",
            reason="interrupted before the worker started",
            ended_by=EndedBy.INTERRUPTED,
        )
    except (OSError, RuntimeError) as error:
        reason = f"{type(error).__name__}: {error}"
        return Outcome(status="error", reason=folder_cause(end_of(job_dir), reason))
    for event in reader.new_events():  # written between the last look and the end
        watched.take(event)
    seen = Circumstances(
        ended_by=ended_by,
        oom_kills=oom_kills() - ooms_before,
        swap_free_bytes=swap_free,
        interrupted_by=Interrupts.sign,
        folder=end_of(job_dir),
    )
    return outcome_of(config, job_dir, watched, worker, seen)


@contextmanager
def swap_folder_of(
    config: RunConfig, job_dir: Path, attempt: str, terminal: Terminal, watched: Watched
) -> Iterator[Path | None]:
    """Own the attempt's swap folder while it runs; it is gone afterwards, whatever happened."""
    if not task_of(config).uses_swap or config.offload.device != "nvme":
        yield None
        return
    assert config.offload.nvme_path is not None, "config_problems refuses nvme without a path"
    path = Path(config.offload.nvme_path)
    said = describe_disk(path)
    terminal.note_once(
        f"weights are swapped to {path}: {said.text}", about=f"swap on {said.mount_point}"
    )
    for warning in said.warnings:
        terminal.warning(warning, about=warning.partition(": ")[2])
        watched.warnings.append(warning)
    swept = remove_orphaned_swap_folders(config.offload.nvme_path, said.filesystem)
    for folder in swept.removed:
        terminal.note(f"removed {folder}, left by a job whose driver was killed")
    for folder in swept.unknown:
        terminal.note(
            f"left {folder} alone: whether its owner still runs cannot be known from here. "
            "Remove it by hand if it does not"
        )
    with claimed_swap_folder(config.offload.nvme_path, attempt, job_dir) as swap:
        try:
            yield swap
        finally:
            if not remove_swap_folder(swap, job_dir):
                terminal.warning(f"{swap} could not be removed: remove it by hand")


@contextmanager
def worker_of(
    config: RunConfig,
    job_dir: Path,
    attempt: str,
    terminal: Terminal,
    server_until: Deadline | None,
) -> Iterator[Worker]:
    """Run the job's worker processes; they and all that they started are gone afterwards.

    Args:
        server_until: take them from a server, and wait for it so long at most; None: fresh ones.
    """
    write_job(job_dir, config, attempt)
    server = None
    if server_until is not None:

        def gives_up() -> bool:
            terminal.tick()
            return Interrupts.received or server_until.is_over()

        server = Servers.ready(config, gives_up)
    worker = start_worker(config, job_dir, attempt, server)
    try:
        pids = [
            {"pid": rank.pid, "start_ticks": process_start_ticks(rank.pid)} for rank in worker.ranks
        ]
        with contextlib.suppress(
            OSError
        ):  # the folder was deleted; the worker says it, if it minds
            write_json(job_dir / WORKERS_FILE, pids)
        yield worker
    finally:
        worker.end()


def _build_ops(config: RunConfig, terminal: Terminal) -> None:
    """Compile what this run loads, apart from the run and said so.

    Raises:
        RuntimeError: it cannot be built.
    """
    ops = native_ops.ops_of(config)
    for message in native_ops.remove_stale_locks(ops):
        terminal.note(message)
    with Interrupts.at_once():  # minutes, the first time on a machine
        native_ops.build(ops, echo=terminal.note)
        for source in cpp_library.sources_of(config, on_cpu=gpu.is_surely_cpu(config.hardware)):
            if not cpp_library.is_built(source):
                terminal.note(f"compiling zinfer's {source.stem}: some seconds")
            with contextlib.suppress(
                cpp_library.CannotBuild
            ):  # the worker says so, and does without
                cpp_library.build_library(source)


@dataclass(frozen=True)
class Deadline:
    """A moment of the monotonic clock after which nothing is waited for; None: never."""

    at_s: float | None

    @classmethod
    def after(cls, timeout_s: float | None) -> Deadline:
        """Return the time so many seconds from now."""
        return cls(None if timeout_s is None else time.monotonic() + timeout_s)

    def is_over(self) -> bool:
        """Say whether the moment has passed."""
        return self.at_s is not None and time.monotonic() > self.at_s


def watch(
    worker: Worker,
    deadline: Deadline,
    reader: EventReader,
    watched: Watched,
    terminal: Terminal,
    stopped: Callable[[], bool],
) -> EndedBy:
    """Take the worker's events until it ends, and return who ended it."""
    while True:
        over = worker.wait(POLL_S)
        for event in reader.new_events():
            watched.take(event)
            terminal.event(event)
        if over:
            return EndedBy.INTERRUPTED if _signalled_together(worker) else EndedBy.ITSELF
        if Interrupts.received or stopped():
            return EndedBy.INTERRUPTED
        if deadline.is_over():
            return EndedBy.TIMEOUT
        terminal.tick()


def _signalled_together(worker: Worker) -> bool:
    """Return whether the driver got the signal that the worker died of, then or shortly after."""
    if -worker.returncode not in COMMON_SIGNALS:
        return False
    deadline_s = time.monotonic() + COMMON_S
    while not Interrupts.received and time.monotonic() < deadline_s:
        time.sleep(0.02)
    return Interrupts.received
