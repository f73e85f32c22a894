"""The story of one run: plan, load, measure, report.

`python -m zinfer.worker JOB_DIR` runs it once for each rank. It reads JOB_DIR/job.json, appends to
JOB_DIR/events.jsonl and never talks to MLflow. Its last event is `result` or `failed`.
"""

from __future__ import annotations

import importlib
import os
import threading
import time
import traceback
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from zinfer.config import ConfigError, RunConfig, config_from_stored
from zinfer.config.engines import engine_loader
from zinfer.config.tasks import function_named, task_of
from zinfer.job.events import EventLog
from zinfer.job.files import ATTEMPT_VARIABLE, DRIVER_READY_FILE
from zinfer.job.folder import own_swap_folder, read_job
from zinfer.job.processes import is_alive
from zinfer.job.swap import held_swap_folder, remove_swap_folder, swap_folder
from zinfer.machine.hardware import detect_hardware
from zinfer.plan.advice import advice_document
from zinfer.plan.deepspeed_json import derivation_warnings
from zinfer.plan.fit import require_fit, shortfall
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.resolved import describe, resolved_spec
from zinfer.plan.scores import scored, speed_warnings
from zinfer.plan.warnings import plan_warnings
from zinfer.worker.failure import failed_event
from zinfer.worker.stability import Evidence, judge
from zinfer.worker.stability import warning as warning_of
from zinfer.worker.watchdog import watched

if TYPE_CHECKING:
    from zinfer.job.quality import Quality
    from zinfer.worker.engines import Engine
    from zinfer.worker.metrics import Measured, Metrics
    from zinfer.worker.quality import Pieces

DRIVER_READY_WAIT_S = 30.0


@dataclass(frozen=True, kw_only=True)
class Loaded:
    """An engine that can generate, and how long it took to get there."""

    engine: Engine
    import_s: float
    load_s: float


def run_task(config: RunConfig, job_dir: Path, events: EventLog) -> None:
    """Do task=run or task=plan; a plan has nothing else to say in its last event."""
    if work(config, job_dir, events) is None and events.rank == 0:
        events.write("result", status="planned", metrics={})


def work(config: RunConfig, job_dir: Path, events: EventLog) -> Metrics | None:
    """Run one benchmark in the order it happens. Return None for task=plan.

    Raises:
        ConfigError, DoesNotFit: nothing was timed.
    """
    planned = prepare(config, job_dir, events)
    if not task_of(config).loads_model:
        return None
    pieces = text_to_score(planned, events)
    limit_s = config.launcher.stall_s if config.offload.device == "nvme" else None
    with watched(limit_s, events):
        loaded = load_engine(planned, events)
        if pieces is not None and config.quality.enabled is True:
            from zinfer.worker.quality import require_reference

            require_reference(planned, loaded.engine, pieces)
        measured, said = measure(planned, loaded, job_dir, events)
        quality = None if pieces is None else scored_text(planned, loaded, pieces, events)
    return report(planned, measured, said, quality, events)


def prepare(config: RunConfig, job_dir: Path, events: EventLog) -> Planned:
    """Plan bytes and seconds, say them, and refuse what does not fit. Loads nothing.

    The configuration in it has the job's own swap folder in place of offload.nvme_path. A job
    that only plans has no such folder: its plan shows the path as it was given.
    """
    events.phase("plan")
    loads_model = task_of(config).loads_model
    hardware = detect_hardware(
        config.hardware,
        config.offload.nvme_folder,
        config.launcher.ranks,
        config.launcher.omp_threads,
    )
    config = _in_own_swap_folder(config, job_dir) if loads_model else _as_given(config, job_dir)
    spec = resolved_spec(config, hardware, events.warning)  # architecture only, no weights
    planned = plan_run(config, hardware, spec)  # bytes and seconds, before any is spent
    if events.rank == 0:
        _say_plan(planned, events)
    if not planned.fits:
        if loads_model and config.plan.enforce:
            require_fit(planned)
        events.warning(shortfall(planned))
    return planned


def load_engine(planned: Planned, events: EventLog) -> Loaded:
    """Import the engine, then load the weights into their tier."""
    events.phase("import")
    started_s = time.perf_counter()
    load = engine_loader(planned.config)
    importlib.import_module("zinfer.worker.generate")
    importlib.import_module("zinfer.worker.metrics")
    trial = importlib.import_module("zinfer.worker.kv_cache.trial")
    import_s = time.perf_counter() - started_s
    said = trial.require_trial(planned.config)
    if said is not None and events.rank == 0:
        events.write("note", message=said)
    events.phase("load", weight_bytes=planned.plan.weight_stored_bytes)
    started_s = time.perf_counter()
    engine = load(planned.config, planned.spec, planned.deepspeed_json(), events)
    load_s = time.perf_counter() - started_s
    if engine.linear is not None:
        load_s -= engine.linear.seconds
    if engine.packed is not None:
        load_s -= engine.packed.seconds
        if engine.rank == 0 and engine.device.type != "cpu":
            events.write("note", message=engine.packed.sentence())
    if engine.verified is not None:
        load_s -= engine.verified.seconds + engine.verified.rounding_s
    elif planned.config.weights == "pretrained":
        events.warning(f"engine={planned.config.engine.name} does not verify its weights")
    return Loaded(engine=engine, import_s=import_s, load_s=load_s)


def measure(
    planned: Planned, loaded: Loaded, job_dir: Path, events: EventLog
) -> tuple[Measured, dict[str, Any]]:
    """Generate and time. Return what was measured and what was said, of all ranks."""
    from zinfer.worker.generate import generate_timed
    from zinfer.worker.kv_cache.session import kv_session
    from zinfer.worker.metrics import Measured
    from zinfer.worker.process_use import block_read_bytes, memory_use
    from zinfer.worker.ranks import gather_over_ranks, rows_of_all
    from zinfer.worker.workload import prompt_ids

    engine, batch = loaded.engine, planned.config.batch
    prompts = prompt_ids(batch, planned.spec.vocab_size, engine.tokenizer)
    _wait_for_quiet_driver(job_dir, events)
    read_before = block_read_bytes()
    with kv_session(engine.model, planned, events) as kv:
        generation = generate_timed(engine, prompts, batch, events, kv)
        memory = memory_use(engine.device, read_before)  # before a profile takes more
        profiled = None
        if planned.config.profile:
            from zinfer.worker.step_profile import profile_step

            profiled = profile_step(engine, prompts, batch, kv, job_dir, events)
    ranks = gather_over_ranks(engine, generation, memory)
    measured = Measured(
        samples=generation.samples,
        yardstick_s=generation.yardstick_s,
        load_s=loaded.load_s,
        import_s=loaded.import_s,
        ranks=ranks,
        threads=planned.config.launcher.ranks * engine.threads,
        surroundings=generation.surroundings,
        verified=engine.verified,
        linear=engine.linear,
        packed=engine.packed,
        profile=profiled,
    )
    return measured, _what_was_said(engine.tokenizer, prompts, rows_of_all(ranks))


def text_to_score(planned: Planned, events: EventLog) -> Pieces | None:
    """Prepare the text that scores the run, before anything is loaded. None: it is not scored.

    Raises:
        ConfigError: quality.enabled=true, and it cannot be. With auto that is only said.
    """
    if not planned.config.may_be_scored:
        return None
    from zinfer.worker.quality import is_quickly_scored, pieces_to_score

    if planned.config.quality.enabled is True:
        return pieces_to_score(planned)
    try:
        return pieces_to_score(planned) if is_quickly_scored(planned, events) else None
    except ConfigError as error:
        _not_scored(error, events)
        return None


def scored_text(
    planned: Planned, loaded: Loaded, pieces: Pieces, events: EventLog
) -> Quality | None:
    """Score the text when all timing is over. Every rank takes part. None: there is no reference.

    Raises:
        ConfigError: quality.enabled=true, and there is none. With auto that is only said.
    """
    from zinfer.worker.quality import NoReference, score

    try:
        return score(planned, loaded.engine, pieces, events)
    except NoReference as error:
        if planned.config.quality.enabled is True:
            raise
        _not_scored(error, events)
        return None


def _not_scored(error: ConfigError, events: EventLog) -> None:
    """Say why a run whose scoring nobody insists on is not scored."""
    if events.rank == 0:
        events.write("note", message=f"not scored: {error}")


def report(
    planned: Planned,
    measured: Measured,
    said: dict[str, Any],
    quality: Quality | None,
    events: EventLog,
) -> Metrics:
    """Summarise the samples, score the prediction, and write the result (rank 0)."""
    from zinfer.worker.metrics import summarise
    from zinfer.worker.ranks import metrics_by_rank

    metrics = summarise(measured, planned.config.batch)
    if events.rank == 0:
        events.write("generated", **said)
        known = {**metrics.known(), **metrics_by_rank(measured.ranks)}
        if measured.verified is not None:
            known |= measured.verified.metrics()
        if quality is not None:
            known |= quality.metrics()
            for reason in quality.reasons:
                events.warning(f"the text is worse than it may be: {reason}")
        scores = scored(known, planned.prediction, planned.plan)
        for warning in speed_warnings(scores):
            events.warning(warning)
        stability = judge(evidence_of(planned, measured))
        if (unstable := warning_of(stability)) is not None:
            events.warning(unstable)
        events.write(
            "result",
            status="ok",
            metrics={**known, **scores},
            stability=stability.document(),
            energy=energy_document(measured, known),
            quality=quality.document() if quality else None,
            profile=measured.profile,
            weights=measured.verified.document() if measured.verified else None,
            linear=measured.linear.document() if measured.linear else None,
            packed=measured.packed.document() if measured.packed else None,
        )
    return metrics


def energy_document(measured: Measured, known: dict[str, float]) -> dict[str, Any]:
    """Say how much energy a token took, and why a number is not known."""
    reasons = [reason for rank in measured.ranks for reason in rank.energy.reasons]
    return {
        "j_per_token": known.get("energy_j_per_token"),
        "host_j_per_token": known.get("host_energy_j_per_token"),
        "reasons": list(dict.fromkeys(reasons)),
    }


def evidence_of(planned: Planned, measured: Measured) -> Evidence:
    """Collect what the run knows of its own circumstances."""
    return Evidence(
        totals_s=measured.totals_s,
        yardstick_s=measured.yardstick_s,
        calibrated_yardstick_s=planned.prediction.yardstick_s,
        threads=measured.threads,
        surroundings=measured.surroundings,
        target_relative_error=planned.config.batch.target_relative_error,
    )


def _in_own_swap_folder(config: RunConfig, job_dir: Path) -> RunConfig:
    """Point offload.nvme_path at the folder that belongs to this job alone."""
    if config.offload.device != "nvme" or not task_of(config).uses_swap:
        return config
    assert config.offload.nvme_path is not None, "config.problems refuses nvme without a path"
    swap = own_swap_folder(config.offload.nvme_path, job_dir)
    return replace(config, offload=replace(config.offload, nvme_path=str(swap)))


def _as_given(config: RunConfig, job_dir: Path) -> RunConfig:
    """Show the default offload.nvme_path as the preset has it: equal inputs give equal plans."""
    folder = config.offload.nvme_folder
    if folder is None or not folder.is_relative_to(job_dir):
        return config
    shown = f"${{hydra:runtime.output_dir}}/{folder.relative_to(job_dir)}"
    return replace(config, offload=replace(config.offload, nvme_path=shown))


def _say_plan(planned: Planned, events: EventLog) -> None:
    """Write the `planned` event, and a warning for everything that the user should know."""
    config, spec = planned.config, planned.spec
    document = planned.document()
    if not task_of(config).loads_model:
        document["advice"] = advice_document(planned)
    deepspeed = planned.deepspeed_json()
    events.write("planned", model=describe(spec, config), plan=document, deepspeed=deepspeed)
    for warning in [*derivation_warnings(config, spec), *plan_warnings(planned)]:
        events.warning(warning)


def _wait_for_quiet_driver(job_dir: Path, events: EventLog) -> None:
    """Start timing when the driver has imported MLflow: a sample never shares a core with it."""
    ready = job_dir / DRIVER_READY_FILE
    deadline_s = time.monotonic() + DRIVER_READY_WAIT_S
    while not ready.exists() and job_dir.exists():  # a deleted folder gets no more files
        if time.monotonic() > deadline_s:
            events.warning(
                f"the driver was still busy after {DRIVER_READY_WAIT_S:.0f} s: "
                "the first samples may share a core with it"
            )
            return
        time.sleep(0.02)


def _what_was_said(
    tokenizer: Any | None, prompts: Any, rows: list[tuple[int, ...]]
) -> dict[str, Any]:
    """Return the first rows as text, so that a person sees the model speak; token ids of all."""
    decode = tokenizer.decode if tokenizer is not None else None
    return {
        "prompt_text": decode(prompts[0].tolist()) if decode else None,
        "text": [decode(ids) for ids in rows[:4]] if decode else None,
        "token_ids": rows,
    }


def _end_with_driver(
    driver_pid: int, start_ticks: int | None, swap: Path | None, job_dir: Path
) -> None:
    """Watch the driver from a thread; when it was killed, clean up in its place and end."""
    while is_alive(driver_pid, start_ticks):
        time.sleep(0.5)
    if swap is not None:
        remove_swap_folder(swap, job_dir)
    os._exit(1)


def main(job_dir: Path) -> int:
    """Run the job of this folder. Exit code 0 when its last event is a result."""
    rank = int(os.environ.get("RANK", "0"))
    job = read_job(job_dir)
    if job is None or job.attempt != os.environ.get(ATTEMPT_VARIABLE, job.attempt):
        return 1  # the driver was killed, and another attempt has begun in its folder
    events = EventLog(job_dir, rank, job.attempt)
    config = config_from_stored(job.config)
    swap = None
    if config.offload.nvme_path and task_of(config).uses_swap:
        swap = swap_folder(config.offload.nvme_path, job.attempt)
    threading.Thread(
        target=_end_with_driver,
        args=(job.driver_pid, job.driver_start_ticks, swap, job_dir),
        daemon=True,
    ).start()
    try:
        worker = task_of(config).worker
        assert worker is not None, "the driver starts no worker for this task"
        with held_swap_folder(swap) if swap is not None and swap.exists() else nullcontext():
            function_named(worker)(config, job_dir, events)
    except BaseException as error:  # whatever it was, the driver must learn the reason
        events.write("failed", **failed_event(error, traceback.format_exc()))
        return 1
    return 0
