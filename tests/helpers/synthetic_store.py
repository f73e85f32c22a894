"""Make an MLflow store full of invented runs: `python tests/helpers/synthetic_store.py DIR [RUNS]`.

The numbers follow a crude model of one box (a 48 GB GPU behind a 25 GB/s link, a 5.6 GB/s disk):
nothing here was measured. Rows are written straight into the tables, because logging 1,000 runs
through MLflow's client takes minutes; everything reads them through it.
"""

from __future__ import annotations

import itertools
import random
import sqlite3
import sys
import uuid
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from multirun_analysis.published.rows import PUBLISHED_PARAMETERS
from zinfer.config import METHOD_VERSION
from zinfer.tracking.store import ensure_store

MODELS = ("opt-30b", "opt-66b", "llama-3-70b", "mixtral-8x22b", "bloom-176b")
KV_BYTES_PER_TOKEN = {
    "opt-30b": 1_376_256,
    "opt-66b": 2_359_296,
    "llama-3-70b": 327_680,
    "mixtral-8x22b": 229_376,
    "bloom-176b": 4_014_080,
}
"""KV bytes per token in 16 bits, from each model's published layers and heads."""
OFFLOADS = ("none", "cpu", "nvme")
DTYPES = {"bfloat16": 2.0, "int8": 1 + 4 / 64, "int4": 0.5 + 4 / 64}
BATCHES = (1, 2, 4, 8, 16, 32, 64)
LINK, DISK, HBM, FLOPS = 25e9, 5.6e9, 768e9, 150e12
GPU_BYTES, HOST_BYTES = 48e9, 252e9
FIRST_START_MS = 1_750_000_000_000
PROMPT, NEW = 512, 32
MLFLOW_STATUS = {
    "ok": "FINISHED",
    "planned": "FINISHED",
    "running": "RUNNING",
    "killed": "KILLED",
    "timeout": "KILLED",
}


@dataclass
class FakeRun:
    """Make the tables' rows for one run."""

    name: str
    status: str
    params: dict[str, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)
    steps: list[float] = field(default_factory=list)
    tags: dict[str, str] = field(default_factory=dict)
    run_id: str = ""


def make_store(folder: Path, runs: int = 1000, *, seed: int = 0, with_oddities: bool = True) -> str:
    """Store one sweep of that many jobs; return its URI."""
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ensure_store(uri)
    rng = random.Random(seed)
    parent = FakeRun(
        name="model=opt-30b,... offload=none,cpu,nvme",
        status="ok",
        tags={"zinfer.role": "sweep", "zinfer.status": "ok"},
    )
    jobs = list(itertools.islice(_jobs(rng), runs))
    if with_oddities:
        jobs += _oddities(rng)
    write_runs(folder / "mlflow.db", "zinfer", [parent, *jobs], children_of_first=True, rng=rng)
    return uri


def _jobs(rng: random.Random) -> Iterator[FakeRun]:
    """Yield the grid, then the grid again: reruns."""
    while True:
        for model, offload, dtype, batch in itertools.product(MODELS, OFFLOADS, DTYPES, BATCHES):
            yield job(model, offload, dtype, batch, rng)


def job(
    model: str, offload: str, dtype: str, batch: int, rng: random.Random, **tags: str
) -> FakeRun:
    """Invent one job: measured, or refused by its memory plan."""
    parameters = PUBLISHED_PARAMETERS[model]
    weight_bytes = parameters * DTYPES[dtype]
    kv_bytes = KV_BYTES_PER_TOKEN[model] * batch * (PROMPT + NEW)
    device_bytes = (
        kv_bytes
        + 3e9
        + batch * 0.05e9
        + (weight_bytes if offload == "none" else 0.02 * weight_bytes)
    )
    host_bytes = 3e9 + (weight_bytes if offload == "cpu" else 10e9 if offload == "nvme" else 1e9)
    run = FakeRun(
        name=f"{model} {offload} {dtype} b{batch}",
        status="ok",
        params={
            "task": "run",
            "weights": "dummy",
            "model.name": model,
            "model.hub_id": f"example/{model}",
            "offload.device": offload,
            "offload.pin_memory": "false",
            "dtype.weights": dtype,
            "dtype.compute": "bfloat16",
            "batch.batch_size": str(batch),
            "batch.prompt_tokens": str(PROMPT),
            "batch.new_tokens": str(NEW),
            "batch.warmup": "1",
            "batch.repeats": "3",
            "batch.prompt": "synthetic",
            "batch.seed": "0",
            "kv_cache.placement": "device",
            "zero.derivation": "tuned",
            "engine.name": "zero",
            "hardware.name": "detect",
            "launcher.ranks": "1",
            "plan.enforce": "true",
            "plan.headroom": "0.05",
        },
        tags={
            "zinfer.role": "job",
            "zinfer.method_version": str(METHOD_VERSION),
            "zinfer.hardware": "0123456789ab",
            "zinfer.device": "NVIDIA RTX A6000",
            "zinfer.commit": "a1b2c3d4e5f60718293a4b5c6d7e8f9012345678",
            "zinfer.dirty": "false",
            "zinfer.dtype": "bfloat16",
            **tags,
        },
    )
    run.metrics = {
        "model_parameters": parameters,
        "weight_stored_bytes": weight_bytes,
        "kv_cache_bytes": kv_bytes,
        "plan_device_needed_bytes": device_bytes,
        "plan_device_available_bytes": GPU_BYTES,
        "plan_host_needed_bytes": host_bytes,
        "plan_host_available_bytes": HOST_BYTES,
        "plan_pinned_needed_bytes": 10e9 if offload == "nvme" else 0.0,
        "plan_disk_needed_bytes": weight_bytes if offload == "nvme" else 0.0,
        "plan_disk_available_bytes": 1.9e12 if offload == "nvme" else 0.0,
    }
    for tier, needed, available in (
        ("device", device_bytes, GPU_BYTES),
        ("host", host_bytes, HOST_BYTES),
    ):
        if needed > available:
            run.status = "does_not_fit"
            run.tags["zinfer.reason"] = (
                f"{tier}: needs {needed / 2**30:.1f} GiB, has {available / 2**30:.1f} GiB. "
                "Try batch.batch_size=1 or dtype=int4"
            )
            return run
    if rng.random() < 0.02:
        run.status = rng.choice(("oom_device", "oom_host", "killed", "timeout", "error"))
        run.tags["zinfer.reason"] = "the worker ended while in phase generate"
        return run
    run.metrics |= _measured(run, weight_bytes, kv_bytes, device_bytes, host_bytes, batch, rng)
    return run


def _measured(
    run: FakeRun,
    weight_bytes: float,
    kv_bytes: float,
    device: float,
    host: float,
    batch: int,
    rng: random.Random,
) -> dict[str, float]:
    """Compute times from bytes over bandwidths, with a fixed cost and noise."""
    offload, parameters = run.params["offload.device"], run.metrics["model_parameters"]
    resources = {
        "device_memory": (weight_bytes + kv_bytes) / HBM,
        "device_compute": 2 * parameters * batch / FLOPS,
        "host_device_link": weight_bytes / LINK if offload != "none" else 0.0,
        "nvme": weight_bytes / DISK if offload == "nvme" else 0.0,
    }
    binding = max(resources, key=lambda name: resources[name])
    ceiling_s = resources[binding]
    predicted_s = ceiling_s * 1.08 + 0.015
    factor = rng.uniform(1.05, 1.25)
    run.steps = [
        ceiling_s * factor * rng.gauss(1, 0.01) + 0.02 + 1e-5 * step for step in range(NEW - 1)
    ]
    step_s = sorted(run.steps)[len(run.steps) // 2]
    prefill_ceiling_s = max(ceiling_s, 2 * parameters * batch * PROMPT / FLOPS)
    prefill_s = prefill_ceiling_s * factor
    total_s = prefill_s + sum(run.steps)
    rate = batch * NEW / total_s
    run.tags["zinfer.binding_resource"] = binding
    return {
        "prefill_s": prefill_s,
        "decode_step_s": step_s,
        "decode_step_s_stddev": step_s * 0.012,
        "decode_step_s_min": min(run.steps),
        "decode_step_s_max": max(run.steps),
        "total_s": total_s,
        "total_s_stddev": total_s * 0.01,
        "time_to_first_token_s": prefill_s,
        "time_per_output_token_s": sum(run.steps) / (NEW - 1),
        "generated_tokens_per_s": rate,
        "generated_tokens_per_s_stddev": rate * 0.01,
        "generated_tokens_per_s_min": rate * 0.985,
        "generated_tokens_per_s_max": rate * 1.012,
        "decode_tokens_per_s": batch * (NEW - 1) / sum(run.steps),
        "load_s": weight_bytes / 2e9,
        "timed_runs": 3,
        "peak_host_rss_bytes": host * rng.uniform(0.97, 1.03),
        "peak_device_allocated_bytes": device * rng.uniform(0.93, 1.0),
        "peak_device_reserved_bytes": device * rng.uniform(0.97, 1.05),
        "mlocked_bytes": run.metrics["plan_pinned_needed_bytes"],
        "ceiling_decode_step_s": ceiling_s,
        "predicted_decode_step_s": predicted_s,
        "ceiling_prefill_s": prefill_ceiling_s,
        "predicted_prefill_s": prefill_ceiling_s * 1.1,
        "ceiling_fraction": ceiling_s / step_s,
        "predicted_generated_tokens_per_s": batch
        * NEW
        / (prefill_ceiling_s * 1.1 + (NEW - 1) * predicted_s),
        **({"streamed_bytes_per_s": weight_bytes / step_s} if offload != "none" else {}),
    }


def _oddities(rng: random.Random) -> list[FakeRun]:
    """Yield what a store holds besides good runs."""
    foreign = FakeRun(
        name="resnet-50", status="ok", params={"lr": "0.1"}, metrics={"accuracy": 0.76}
    )
    grid = FakeRun(
        name="plan of 9 points",
        status="planned",
        tags={"zinfer.role": "plan_grid"},
        metrics={"plans": 9},
    )
    older = job("opt-30b", "cpu", "bfloat16", 8, rng, **{"zinfer.method_version": "0"})
    other_commit = job(
        "opt-30b",
        "cpu",
        "bfloat16",
        8,
        rng,
        **{"zinfer.commit": "ffffffffffffffffffffffffffffffffffffffff", "zinfer.dirty": "true"},
    )
    without_speed = job("opt-30b", "cpu", "bfloat16", 4, rng)
    without_speed.metrics = {"weight_stored_bytes": 6e10}
    running = job("opt-30b", "cpu", "bfloat16", 2, rng)
    running.status, running.metrics = "running", {}
    planned = job("opt-30b", "cpu", "bfloat16", 128, rng)
    planned.status, planned.params["task"] = "planned", "plan"
    return [foreign, grid, older, other_commit, without_speed, running, planned]


def write_runs(
    database: Path,
    experiment: str,
    runs: list[FakeRun],
    *,
    rng: random.Random,
    children_of_first: bool = False,
) -> None:
    """Append runs to an experiment, a second apart.

    Args:
        children_of_first: the first run is the parent of the others.
    """
    with sqlite3.connect(database) as connection:
        connection.execute(
            "INSERT OR IGNORE INTO experiments (name, artifact_location, lifecycle_stage,"
            " creation_time, last_update_time) VALUES (?, ?, 'active', 0, 0)",
            (experiment, str(database.parent / "mlartifacts")),
        )
        (experiment_id,) = connection.execute(
            "SELECT experiment_id FROM experiments WHERE name = ?", (experiment,)
        ).fetchone()
        (known,) = connection.execute("SELECT count(*) FROM runs").fetchone()
        for number, run in enumerate(runs):
            run.run_id = uuid.UUID(int=rng.getrandbits(128)).hex
            if children_of_first and number:
                run.tags.setdefault("mlflow.parentRunId", runs[0].run_id)
            _write_run(
                connection,
                experiment_id,
                run,
                FIRST_START_MS + 1000 * (known + number),
                str(database.parent),
            )


def _write_run(
    connection: sqlite3.Connection, experiment_id: int, run: FakeRun, start_ms: int, folder: str
) -> None:
    connection.execute(
        "INSERT INTO runs (run_uuid, name, source_type, source_name, user_id, status, start_time,"
        " end_time, lifecycle_stage, artifact_uri, experiment_id)"
        " VALUES (?, ?, 'LOCAL', 'zinfer', '', ?, ?, ?, 'active', ?, ?)",
        (
            run.run_id,
            run.name,
            MLFLOW_STATUS.get(run.status, "FAILED"),
            start_ms,
            start_ms + 900,
            f"{folder}/mlartifacts/{run.run_id}/artifacts",
            experiment_id,
        ),
    )
    if "lr" not in run.params:
        run.tags.setdefault("zinfer.status", run.status)
    tags = {"mlflow.runName": run.name, **run.tags}
    for table, values in (("tags", tags), ("params", run.params)):
        rows = [(key, value, run.run_id) for key, value in values.items()]
        connection.executemany(f"INSERT INTO {table} (key, value, run_uuid) VALUES (?, ?, ?)", rows)
    points = [(key, value, 0) for key, value in run.metrics.items()] + [
        ("decode_step_s_by_step", value, step) for step, value in enumerate(run.steps)
    ]
    logged = [(key, value, start_ms, run.run_id, step) for key, value, step in points]
    connection.executemany(
        "INSERT INTO metrics (key, value, timestamp, run_uuid, step, is_nan)"
        " VALUES (?, ?, ?, ?, ?, 0)",
        logged,
    )
    latest = {key: (key, value, start_ms, step, run.run_id) for key, value, _, _, step in logged}
    connection.executemany(
        "INSERT INTO latest_metrics (key, value, timestamp, step, is_nan, run_uuid)"
        " VALUES (?, ?, ?, ?, 0, ?)",
        list(latest.values()),
    )


if __name__ == "__main__":
    print(make_store(Path(sys.argv[1]).absolute(), int(sys.argv[2]) if len(sys.argv) > 2 else 1000))
