"""Stores to look at reports: one run, one batch, many, failures, plans, long generations."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path

from tests.helpers.synthetic_store import FakeRun, job, make_store, write_runs
from zinfer.tracking.store import ensure_store

BOX = {
    "hardware.name": "a6000",
    "hardware.accelerator": "cuda",
    "hardware.device_name": "NVIDIA RTX A6000",
    "hardware.device_bytes": "48000000000",
    "hardware.host_bytes": "252000000000",
    "hardware.device_memory_bytes_per_s": "768000000000.0",
    "hardware.host_to_device_bytes_per_s": "31500000000.0",
    "hardware.nvme_read_bytes_per_s": "5600000000.0",
}
"""Parameters of a published box, as a run that names it logs them."""


def one_run(rng: random.Random) -> list[FakeRun]:
    """Return one measured run, with a warning."""
    run = measured("opt-30b", "cpu", "int4", 24, rng)
    run.tags["zinfer.warnings"] = "dtype=bfloat16 is slow on this processor: try dtype=float32"
    return [run]


def one_batch(rng: random.Random) -> list[FakeRun]:
    """Invent three places of the weights at one batch; one of them disturbed."""
    runs = [measured("opt-30b", offload, "int4", 8, rng) for offload in ("none", "cpu", "nvme")]
    runs[2].tags |= {
        "zinfer.stability": "disturbed",
        "zinfer.stability_reason": "the machine was 2.3 times slower\nother processes took a core",
    }
    return runs


def failures(rng: random.Random) -> list[FakeRun]:
    """Invent ends that measured nothing."""
    statuses = ("does_not_fit", "oom_device", "killed", "timeout", "error", "refused")
    runs = []
    for number, status in enumerate(statuses):
        run = measured("bloom-176b", "cpu", "bfloat16", 2**number, rng)
        keep = ("plan_device_needed_bytes", "plan_device_available_bytes")
        run.metrics = {name: run.metrics[name] for name in keep}
        run.status, run.steps = status, []
        run.tags["zinfer.reason"] = "device: needs 70.0 GiB, has 48.0 GiB. Try batch.batch_size=1"
        runs.append(run)
    return runs


def plans_only(rng: random.Random) -> list[FakeRun]:
    """Invent plans of a published table for its own box."""
    runs = []
    rows = (("opt-30b", 24), ("opt-66b", 16), ("opt-175b", 8), ("bloom-176b", 4))
    for model, batch in rows:
        run = measured("opt-30b", "cpu", "int4", batch, rng)
        kept = {
            name: value
            for name, value in run.metrics.items()
            if name.startswith(("plan_", "ceiling_", "predicted_")) and name != "ceiling_fraction"
        }
        kept["ceiling_generated_tokens_per_s"] = 1.3 * kept["predicted_generated_tokens_per_s"]
        run.status, run.steps = "planned", []
        run.metrics = {**kept, "plan_fits": 1.0}
        run.params |= {**BOX, "task": "plan", "model.name": model}
        runs.append(run)
    return runs


def long_generation(rng: random.Random) -> list[FakeRun]:
    """Invent two places of the weights, 2,000 noisy steps that grow."""
    runs = one_batch(rng)[:2]
    for number, run in enumerate(runs):
        base = 0.05 * (1 + number)
        run.steps = [
            base * (1 + step / 4000) * rng.lognormvariate(0, 0.08) * (8 if step % 311 == 7 else 1)
            for step in range(2000)
        ]
    return runs


def measured(model: str, offload: str, dtype: str, batch: int, rng: random.Random) -> FakeRun:
    """Return an invented job that ended well, whatever its plan says."""
    while True:
        run = job(model, offload, dtype, batch, rng)
        if run.status == "ok":
            return run
        if run.status == "does_not_fit":
            return measured("opt-30b", offload, "int4", min(batch, 24), rng)


STORIES: dict[str, Callable[[random.Random], list[FakeRun]]] = {
    "one-run": one_run,
    "one-batch": one_batch,
    "failures": failures,
    "plans-only": plans_only,
    "long-generation": long_generation,
}


def make_story(name: str, folder: Path) -> str:
    """Store one sweep that tells this story ('many': 200 runs); return its URI."""
    if name == "many":
        return make_store(folder, 200)
    folder.mkdir(parents=True, exist_ok=True)
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ensure_store(uri)
    rng = random.Random(0)
    parent = FakeRun(name=name, status="ok", tags={"zinfer.role": "sweep", "zinfer.status": "ok"})
    runs = STORIES[name](rng)
    write_runs(folder / "mlflow.db", "zinfer", [parent, *runs], children_of_first=True, rng=rng)
    return uri
