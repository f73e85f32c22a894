"""The story of one run, top to bottom. `python -m zinfer.worker JOB_DIR`, once per rank; started and watched by zinfer.driver.

It reads JOB_DIR/config.json, appends to JOB_DIR/events.jsonl and never talks to MLflow. Its last event is `result` or `failed`.
"""

from __future__ import annotations

import os
import threading
import time
import traceback
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError, RunConfig, config_from_tree
from zinfer.config.engines import engine_loader
from zinfer.config.tasks import function_named, task_of
from zinfer.job.events import EventLog
from zinfer.job.files import DRIVER_READY_FILE
from zinfer.job.folder import read_job_config
from zinfer.job.outcome import Status
from zinfer.job.swap import is_alive, remove_swap_folder, swap_folder
from zinfer.machine.hardware import detect_hardware
from zinfer.plan.advice import plan_warnings
from zinfer.plan.deepspeed_json import derivation_warnings
from zinfer.plan.memory import DoesNotFit, derive, memory_plan, require_fit, shortfall
from zinfer.plan.page import advice_document
from zinfer.plan.prediction import predict, scored, speed_warnings
from zinfer.plan.resolved import describe, resolved_spec

if TYPE_CHECKING:
    from zinfer.worker.engines import Engine
    from zinfer.worker.generate import Generation
    from zinfer.worker.metrics import MemoryUse, Metrics

RANK_METRICS = ("peak_host_rss_bytes", "peak_device_allocated_bytes")
DRIVER_READY_WAIT_S = 30.0


def work(config: RunConfig, job_dir: Path, events: EventLog) -> Metrics | None:
    """One benchmark run, in the order it happens. None for task=plan.

    Raises:
        ConfigError, DoesNotFit: nothing was loaded.
    """
    events.phase("plan")
    if config.offload.device == "nvme":
        assert config.offload.nvme_path is not None, "config.py refuses nvme without a path"
        swap = swap_folder(config.offload.nvme_path, job_dir)
        config = replace(config, offload=replace(config.offload, nvme_path=str(swap)))
    hardware = detect_hardware(
        config.hardware,
        config.offload.nvme_folder,
        config.launcher.ranks,
        config.launcher.omp_threads,
    )
    spec = resolved_spec(config, hardware, events.warning)  # architecture only, no weights
    plan = memory_plan(spec, config, hardware)  # bytes per tier, before any is allocated
    prediction = predict(spec, config, hardware)  # seconds, before any is spent
    ds_json = derive(config, spec, hardware)
    if events.rank == 0:
        planned = {**plan.document(), "prediction": prediction.document(plan)}
        if not task_of(config).loads_model:
            planned["advice"] = advice_document(spec, config, hardware, plan, prediction)
        events.write("planned", model=describe(spec, config), plan=planned, deepspeed=ds_json)
        for warning in [
            *derivation_warnings(config, spec),
            *plan_warnings(spec, config, hardware, plan, prediction),
        ]:
            events.warning(warning)
    if not task_of(config).loads_model:
        if not plan.fits:
            events.warning(shortfall(plan, spec, config, hardware))
        return None
    if config.plan.enforce:
        require_fit(plan, spec, config, hardware)
    elif not plan.fits:
        events.warning(shortfall(plan, spec, config, hardware))

    events.phase("import")
    started_s = time.perf_counter()
    from zinfer.worker.generate import generate_timed
    from zinfer.worker.metrics import summarise
    from zinfer.worker.workload import prompt_ids

    load = engine_loader(config)
    import_s = time.perf_counter() - started_s

    events.phase("load", weight_bytes=plan.weight_bytes)
    started_s = time.perf_counter()
    engine = load(config, spec, ds_json, events)
    load_s = time.perf_counter() - started_s

    prompts = prompt_ids(config.batch, spec.vocab_size, engine.tokenizer)
    _wait_for_quiet_driver(job_dir, events)
    read_before = _block_read_bytes()
    generation = generate_timed(engine, prompts, config.batch, events)
    memory, kv_bytes, weight_bytes, token_ids = _gather_over_ranks(
        engine, generation, _memory_use(engine, read_before)
    )
    metrics = summarise(
        generation.samples,
        config.batch,
        yardstick_s=generation.yardstick_s,
        load_s=load_s,
        import_s=import_s,
        memory=memory,
        weight_bytes=weight_bytes,
        kv_cache_bytes=kv_bytes,
    )
    if events.rank == 0:
        events.write("generated", **_what_was_said(engine, prompts, token_ids))
        known = {**metrics.known(), **by_rank(memory)}
        scores = scored(known, prediction, plan)
        for warning in speed_warnings(scores):
            events.warning(warning)
        events.write("result", status="ok", metrics={**known, **scores})
    return metrics


def run_task(config: RunConfig, job_dir: Path, events: EventLog) -> None:
    """Do task=run or task=plan; a plan has nothing else to say in its last event."""
    if work(config, job_dir, events) is None and events.rank == 0:
        events.write("result", status="planned", metrics={})


def by_rank(memory: list[MemoryUse]) -> dict[str, float]:
    """Peak memory of each of several ranks; Metrics has the totals."""
    if len(memory) == 1:
        return {}
    peaks = {
        f"rank{rank}_{name}": getattr(use, name)
        for rank, use in enumerate(memory)
        for name in RANK_METRICS
    }
    return {name: value for name, value in peaks.items() if value is not None}


def _wait_for_quiet_driver(job_dir: Path, events: EventLog) -> None:
    """The driver imports MLflow beside our loading; timing starts when it is done, so that it never shares a core with a sample."""
    ready = job_dir / DRIVER_READY_FILE
    deadline_s = time.monotonic() + DRIVER_READY_WAIT_S
    while not ready.exists():
        if time.monotonic() > deadline_s:
            events.warning(
                f"the driver was still busy after {DRIVER_READY_WAIT_S:.0f} s: the first samples may share a core with it"
            )
            return
        time.sleep(0.02)


def _memory_use(engine: Engine, read_before: int | None) -> MemoryUse:
    """This process, now."""
    import torch

    from zinfer.worker.metrics import MemoryUse

    read_now = _block_read_bytes()
    on_gpu = engine.device.type != "cpu"
    return MemoryUse(
        peak_host_rss_bytes=_proc_bytes("status", "VmHWM") or 0,
        mlocked_bytes=_proc_bytes("status", "VmLck") or 0,
        huge_page_bytes=_proc_bytes("smaps_rollup", "AnonHugePages"),
        nvme_read_bytes=None if read_now is None or read_before is None else read_now - read_before,
        peak_device_allocated_bytes=torch.cuda.max_memory_allocated(engine.device)
        if on_gpu
        else None,
        peak_device_reserved_bytes=torch.cuda.max_memory_reserved(engine.device)
        if on_gpu
        else None,
    )


def _proc_bytes(file: str, field: str) -> int | None:
    """A size of /proc/self/status or smaps_rollup in bytes; None where the kernel does not say. Source: proc(5), in kB of 1024 bytes."""
    try:
        lines = Path("/proc/self", file).read_text().splitlines()
    except OSError:
        return None
    return next(
        (int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":")), None
    )


def _block_read_bytes() -> int | None:
    """Bytes that this process caused to be read from block devices; None where the kernel does not say. Source: proc(5), io."""
    try:
        lines = Path("/proc/self/io").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) for line in lines if line.startswith("read_bytes:")), None)


TokenIds = list[tuple[int, ...]]


def _gather_over_ranks(
    engine: Engine, generation: Generation, memory: MemoryUse
) -> tuple[list[MemoryUse], int | None, int, TokenIds]:
    """Memory of every rank; KV-cache bytes, weight bytes and the new tokens of all of them, rows in the order of the prompts."""
    mine = (memory, generation.kv_cache_bytes, engine.weight_bytes, generation.token_ids)
    if engine.ranks == 1:
        everyone: list[Any] = [mine]
    else:
        import torch.distributed

        everyone = [None] * engine.ranks
        torch.distributed.all_gather_object(everyone, mine)
    kv = [entry[1] for entry in everyone]
    rows = [row for entry in everyone for row in entry[3]]
    return (
        [entry[0] for entry in everyone],
        None if None in kv else sum(kv),
        sum(entry[2] for entry in everyone),
        rows,
    )


def _what_was_said(engine: Engine, prompts: Any, rows: TokenIds) -> dict[str, Any]:
    """The first rows as text, so that a person can see that the model speaks; the token ids of all."""
    decode = engine.tokenizer.decode if engine.tokenizer is not None else None
    return {
        "prompt_text": decode(prompts[0].tolist()) if decode else None,
        "text": [decode(ids) for ids in rows[:4]] if decode else None,
        "token_ids": rows,
    }


def failure(error: BaseException) -> tuple[Status, str]:
    """Status and one-line reason of what ended a run."""
    import torch

    message = (str(error).strip().splitlines() or [type(error).__name__])[0]
    if isinstance(error, DoesNotFit):
        return "does_not_fit", str(error)
    if isinstance(error, ConfigError):
        return "refused", str(error)
    if isinstance(error, torch.cuda.OutOfMemoryError):
        return "oom_device", message
    host_memory_signs = (
        "can't allocate memory",
        "cannot allocate memory",
        "not enough memory",
        "mlock",
        "bad_alloc",
        "std::bad_alloc",
    )
    if isinstance(error, MemoryError) or any(
        sign in str(error).lower() for sign in host_memory_signs
    ):
        return "oom_host", f"host memory ran out: {message}"
    return "error", f"{type(error).__name__}: {message}"


def _end_with_driver(
    driver_pid: int, start_ticks: int | None, config: RunConfig, job_dir: Path
) -> None:
    """In a thread: a driver that was killed cannot clean up, so the worker removes its swap folder and ends."""
    while is_alive(driver_pid, start_ticks):
        time.sleep(0.5)
    if config.offload.nvme_path:
        remove_swap_folder(swap_folder(config.offload.nvme_path, job_dir))
    os._exit(1)


def main(job_dir: Path) -> int:
    """Run the job of this folder. Exit code 0 when its last event is a result."""
    rank = int(os.environ.get("RANK", "0"))
    events = EventLog(job_dir, rank)
    tree, driver_pid, driver_start_ticks = read_job_config(job_dir)
    config = config_from_tree(tree)
    threading.Thread(
        target=_end_with_driver, args=(driver_pid, driver_start_ticks, config, job_dir), daemon=True
    ).start()
    try:
        worker = task_of(config).worker
        assert worker is not None, "the driver starts no worker for this task"
        function_named(worker)(config, job_dir, events)
    except BaseException as error:  # whatever it was, the driver must learn the reason
        status, reason = failure(error)
        problems = error.problems if isinstance(error, ConfigError) else []
        events.write(
            "failed",
            status=status,
            reason=reason,
            problems=problems,
            traceback=traceback.format_exc(),
        )
        return 1
    return 0
