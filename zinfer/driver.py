"""One job: check it against this machine, start its worker, watch it, and end it truthfully whatever happened.

The driver imports neither torch nor transformers nor deepspeed. The isolation is here, in the job, so it holds under every launcher.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer import native_ops
from zinfer.config import ConfigError, RunConfig
from zinfer.environment import environment
from zinfer.events import Event, EventReader
from zinfer.hardware import Hardware, detect_hardware
from zinfer.job import DRIVER_READY_FILE, RESULT_FILE, WORKER_LOG, write_job
from zinfer.outcome import Outcome
from zinfer.swap import claim_swap_folder, remove_orphaned_swap_folders, remove_swap_folder
from zinfer.terminal import Terminal
from zinfer.tracking import TrackingUnavailable, open_run

if TYPE_CHECKING:
    from zinfer.tracking import TrackedRun

POLL_S = 0.1
END_GRACE_S = 3.0
"""Between SIGTERM and SIGKILL for a worker that is told to end."""
TRACEBACK_LINES = 40


def run_job(config: RunConfig, job_dir: Path, terminal: Terminal) -> Outcome:
    """Run one job to whatever end. Writes JOB_DIR/result.json; never raises for what the job did."""
    job_dir.mkdir(parents=True, exist_ok=True)
    try:
        hardware = detect_hardware(config.hardware, _nvme_path(config))
        require_possible(config, hardware, terminal)
    except (ConfigError, ValueError) as error:
        problems = error.problems if isinstance(error, ConfigError) else [str(error)]
        return finish(refusal(problems, job_dir), job_dir, terminal)
    tracked = TrackingThread(config, job_dir)
    try:
        outcome = run_worker(config, job_dir, terminal, tracked)
    finally:
        tracked.give_up()
    outcome = replace(outcome, job_dir=str(job_dir), environment=tracked.environment)
    outcome = tracked.finish(outcome, terminal)
    return finish(outcome, job_dir, terminal)


def refusal(problems: list[str], job_dir: Path | None = None) -> Outcome:
    """What becomes of a configuration that cannot run."""
    return Outcome(status="refused", reason="; ".join(problems), problems=tuple(problems), job_dir=str(job_dir) if job_dir else None)


def finish(outcome: Outcome, job_dir: Path, terminal: Terminal) -> Outcome:
    """Store the result beside the job and show it."""
    (job_dir / RESULT_FILE).write_text(json.dumps(outcome.document(), indent=1))
    terminal.finish(outcome)
    return outcome


def _nvme_path(config: RunConfig) -> Path | None:
    return Path(config.offload.nvme_path) if config.offload.nvme_path else None


def require_possible(config: RunConfig, hardware: Hardware, terminal: Terminal) -> None:
    """Refuse what this machine cannot do, before anything is loaded.

    Raises:
        ConfigError: with every problem and what to type.
    """
    problems = []
    wanted = [kind for kind in (config.dtype.compute,) if kind != "auto" and kind not in hardware.device_dtypes]
    problems += [
        f"dtype={kind}: {hardware.device_name} does not compute in it. Type dtype={'bfloat16' if kind != 'bfloat16' else 'float32'}"
        for kind in wanted
    ]
    if hardware.device_kind == "cuda" and config.launcher.ranks > hardware.device_count:
        problems.append(
            f"launcher.ranks={config.launcher.ranks}, but there are {hardware.device_count} devices. "
            f"Type launcher.ranks={hardware.device_count}"
        )
    if config.offload.use_gds and hardware.device_kind != "cuda":
        problems.append("offload.use_gds=true reads straight into GPU memory, and there is no GPU. Type offload.use_gds=false")
    if not config.plan.enforce:
        for problem in problems:
            terminal.warning(problem)
        problems = []
    if config.task == "run" and config.engine.name == "zero":
        problems += native_ops.missing_requirements(config.offload.device, use_gds=config.offload.use_gds)
    if config.task == "run" and config.offload.device == "nvme" and not problems:
        problems += _unwritable(config)
    if problems:
        raise ConfigError(problems)


def _unwritable(config: RunConfig) -> list[str]:
    """nvme_path that cannot be made or written to."""
    path = Path(str(config.offload.nvme_path)).expanduser().absolute()
    existing = next(folder for folder in (path, *path.parents) if folder.exists())
    if not existing.is_dir():
        return [f"offload.nvme_path={path}: {existing} is not a folder. Type offload.nvme_path=/path/to/a/folder/on/a/local/disk"]
    if not os.access(existing, os.W_OK | os.X_OK):
        return [f"offload.nvme_path={path}: {existing} is not writable. Type offload.nvme_path=/path/to/a/folder/that/you/own"]
    return []


@dataclass
class Watched:
    """What the events of a worker have said so far."""

    model: dict[str, Any] | None = None
    plan: dict[str, Any] | None = None
    deepspeed: dict[str, Any] | None = None
    result: Event | None = None
    failed: Event | None = None
    generated: dict[str, Any] | None = None
    phase: str = "start"
    samples: list[Event] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def take(self, event: Event) -> None:
        """One more event."""
        fields = {key: value for key, value in event.items() if key not in ("event", "time_s")}
        match event["event"]:
            case "planned":
                self.model, self.plan, self.deepspeed = fields["model"], fields["plan"], fields["deepspeed"]
            case "phase":
                self.phase = fields["name"]
            case "sample":
                self.samples.append(fields)
            case "warning":
                self.warnings.append(fields["message"])
            case "generated":
                self.generated = fields
            case "result":
                self.result = fields
            case "failed":
                self.failed = self.failed or fields


def run_worker(config: RunConfig, job_dir: Path, terminal: Terminal, tracked: TrackingThread) -> Outcome:
    """Start the worker, watch it, and say how it ended. Leaves no process and no swap file."""
    ooms_before = oom_kills()
    watched, reader = Watched(), EventReader(job_dir)
    ended, returncode = "exit", 0
    try:
        with swap_folder_of(config, job_dir, terminal), worker_of(config, job_dir, terminal) as worker:
            tracked.start()  # beside the worker's imports, not after the run
            ended = watch(worker, config, reader, watched, terminal)
        returncode = worker.returncode
    except KeyboardInterrupt:
        ended = "interrupted"
    except (OSError, RuntimeError) as error:
        return Outcome(status="error", reason=f"{type(error).__name__}: {error}")
    for event in reader.new_events():  # written between the last look and the end
        watched.take(event)
    return outcome_of(config, job_dir, watched, returncode, ended, oom_kills() - ooms_before)


@contextmanager
def swap_folder_of(config: RunConfig, job_dir: Path, terminal: Terminal) -> Iterator[None]:
    """The job's swap folder while it runs; gone afterwards, whatever happened."""
    if config.task != "run" or config.offload.device != "nvme":
        yield
        return
    assert config.offload.nvme_path is not None, "config_problems refuses nvme without a path"
    for folder in remove_orphaned_swap_folders(config.offload.nvme_path):
        terminal.note(f"removed {folder}, left by a job whose driver was killed")
    swap = claim_swap_folder(config.offload.nvme_path, job_dir)
    try:
        yield
    finally:
        remove_swap_folder(swap)


@contextmanager
def worker_of(config: RunConfig, job_dir: Path, terminal: Terminal) -> Iterator[subprocess.Popen[bytes]]:
    """The job's worker process; it and all that it started are gone afterwards."""
    if config.task == "run":
        _build_ops(config, terminal)
    write_job(job_dir, config)
    worker = start_worker(config, job_dir)
    try:
        yield worker
    finally:
        end_process_group(worker)


def _build_ops(config: RunConfig, terminal: Terminal) -> None:
    """Compile what this run loads, apart from the run and said so. Raises RuntimeError when it cannot be built."""
    if config.engine.name != "zero":
        return
    ops = native_ops.ops_needed(config.offload.device, use_gds=config.offload.use_gds)
    for message in native_ops.remove_stale_locks(ops):
        terminal.note(message)
    native_ops.build(ops, echo=terminal.note)


def start_worker(config: RunConfig, job_dir: Path) -> subprocess.Popen[bytes]:
    """The worker process, or torchrun over several; its output goes to JOB_DIR/worker.log."""
    ranks = config.launcher.ranks
    command = [sys.executable, "-m", "zinfer.worker", str(job_dir)]
    if ranks > 1:
        port = config.launcher.master_port or free_port()
        torchrun = ["torch.distributed.run", f"--nproc-per-node={ranks}", "--master-addr=127.0.0.1", f"--master-port={port}"]
        command = [sys.executable, "-m", *torchrun, "-m", "zinfer.worker", str(job_dir)]
    with (job_dir / WORKER_LOG).open("ab") as log:
        return subprocess.Popen(
            command,
            env=worker_environment(config),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # Ctrl-C reaches the driver alone, which ends the worker in order
        )


def worker_environment(config: RunConfig) -> dict[str, str]:
    """The environment of a worker: what must be set before torch and DeepSpeed are imported."""
    env = {**os.environ, **native_ops.worker_environment()}
    threads = config.launcher.omp_threads or max(1, len(os.sched_getaffinity(0)) // config.launcher.ranks)
    env["OMP_NUM_THREADS"] = str(threads)
    env.setdefault("TOKENIZERS_PARALLELISM", "false")
    env.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    env.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    env.setdefault("PYTHONUNBUFFERED", "1")
    env["PYTHONPATH"] = os.pathsep.join([str(Path(__file__).parent.parent), *filter(None, [env.get("PYTHONPATH")])])
    if config.hardware.accelerator != "auto":
        env["DS_ACCELERATOR"] = config.hardware.accelerator
    if config.launcher.ranks == 1:
        env.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1")
        env["MASTER_PORT"] = str(config.launcher.master_port or free_port())
    return env


def free_port() -> int:
    """A TCP port that is free now."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def watch(worker: subprocess.Popen[bytes], config: RunConfig, reader: EventReader, watched: Watched, terminal: Terminal) -> str:
    """Take the worker's events until it ends: `exit`, or `timeout`."""
    deadline_s = None if config.launcher.timeout_s is None else time.monotonic() + config.launcher.timeout_s
    while True:
        running = worker.poll() is None
        for event in reader.new_events():
            watched.take(event)
            terminal.event(event)
        if not running:
            return "exit"
        if deadline_s is not None and time.monotonic() > deadline_s:
            return "timeout"
        try:
            worker.wait(POLL_S)
        except subprocess.TimeoutExpired:
            terminal.tick()


def end_process_group(worker: subprocess.Popen[bytes]) -> None:
    """End the worker and everything it started: asked first, then killed."""
    for sign, grace_s in ((signal.SIGTERM, END_GRACE_S), (signal.SIGKILL, 30.0)):
        if worker.poll() is None:
            _signal_group(worker.pid, sign)
            try:
                worker.wait(grace_s)
            except subprocess.TimeoutExpired:
                continue
    _signal_group(worker.pid, signal.SIGKILL)  # what outlived its leader


def _signal_group(group: int, sign: signal.Signals) -> None:
    try:
        os.killpg(group, sign)
    except ProcessLookupError:
        return


def oom_kills() -> int:
    """How often the kernel has killed for want of memory on this machine. Source: oom_kill in /proc/vmstat, Linux 4.13 and later."""
    try:
        lines = Path("/proc/vmstat").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith("oom_kill ")), 0)


def outcome_of(config: RunConfig, job_dir: Path, watched: Watched, returncode: int, ended: str, oom_kills_during: int) -> Outcome:
    """The truthful status: the worker's own word if it had a last one, else what the system says of its end."""
    common: dict[str, Any] = {
        "model": watched.model,
        "plan": watched.plan,
        "deepspeed": watched.deepspeed,
        "samples": tuple(watched.samples),
        "warnings": tuple(watched.warnings),
        "generated": watched.generated,
    }
    where = f"while in phase {watched.phase}"
    if watched.result is not None:
        return Outcome(status=watched.result["status"], metrics=watched.result["metrics"], **common)
    if ended == "interrupted":
        return Outcome(status="killed", reason=f"interrupted {where}", **common)
    if ended == "timeout":
        return Outcome(status="timeout", reason=f"not done after launcher.timeout_s={config.launcher.timeout_s:g} {where}", **common)
    failed = watched.failed or _failed_on_another_rank(job_dir)
    if failed is not None:
        problems = tuple(failed["problems"])
        return Outcome(status=failed["status"], reason=failed["reason"], problems=problems, traceback=failed["traceback"], **common)
    log_tail = _log_tail(job_dir)
    killed_by = _killing_signal(returncode, log_tail)
    if killed_by == signal.SIGKILL and oom_kills_during:
        return Outcome(
            status="oom_host", reason=f"the kernel ended the worker for want of host memory {where}", traceback=log_tail, **common
        )
    if killed_by is not None:
        return Outcome(status="killed", reason=f"the worker was ended by {killed_by.name} {where}", traceback=log_tail, **common)
    return Outcome(
        status="error", reason=f"the worker ended with exit code {returncode} {where} and said nothing", traceback=log_tail, **common
    )


def _failed_on_another_rank(job_dir: Path) -> Event | None:
    """The first failure that a rank other than 0 reported."""
    failures = []
    for path in job_dir.glob("events.rank*.jsonl"):
        events = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
        failures += [event for event in events if event["event"] == "failed"]
    return min(failures, key=lambda event: event["time_s"], default=None)


def _log_tail(job_dir: Path) -> str | None:
    try:
        lines = (job_dir / WORKER_LOG).read_text(errors="replace").splitlines()
    except OSError:
        return None
    return "\n".join(lines[-TRACEBACK_LINES:]) or None


def _killing_signal(returncode: int, log_tail: str | None) -> signal.Signals | None:
    """The signal that ended the worker, or, under torchrun, the rank that died first."""
    if returncode < 0:
        return signal.Signals(-returncode)
    named = re.search(r"exitcode\s*:\s*-(\d+)", log_tail or "")
    return signal.Signals(int(named.group(1))) if named else None


class TrackingThread:
    """Opens the MLflow run beside the worker's imports; the worker starts timing when it is done."""

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
            self.environment = environment(self._config, _nvme_path(self._config))
            self._run = open_run(self._config, job_dir=self._job_dir, environment=self.environment)
        except TrackingUnavailable as error:
            self._problem = str(error)
        finally:
            (self._job_dir / DRIVER_READY_FILE).touch()

    def give_up(self) -> None:
        """Wait until the opening is over, however it went."""
        if self._thread is not None:
            self._thread.join()

    def finish(self, outcome: Outcome, terminal: Terminal) -> Outcome:
        """Log the outcome and end the MLflow run; what cannot be logged stays in the job folder and is said."""
        if self._run is not None:
            outcome = replace(outcome, run_id=self._run.run_id)
            try:
                self._run.finish(outcome)
            except TrackingUnavailable as error:
                self._problem = str(error)
        if self._problem is not None:
            terminal.warning(f"not logged to MLflow: {self._problem}. The run's files are in {self._job_dir}")
        return outcome
