"""Log one invented outcome in a real store: configuration, environment, run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from zinfer.config import RunConfig, parse_config
from zinfer.job.outcome import Outcome
from zinfer.tracking.run import TrackedRun, open_run

CONF = Path(__file__).parents[2] / "conf"
ENVIRONMENT: dict[str, Any] = {
    "zinfer": {"version": "0.1.0", "commit": "0123abcd", "dirty": True},
    "cpu": {"model": "AMD EPYC 7763", "usable_cores": 64, "instruction_sets": ["avx512_bf16"]},
    "host_total_bytes": 540 * 2**30,
    "gpus": [{"name": "NVIDIA H100 80GB HBM3"}, {"name": "NVIDIA H100 80GB HBM3"}],
    "disk": {"filesystem": "xfs"},
}
SAMPLES = (
    {"kind": "warmup", "index": 0, "prefill_s": 9.0, "decode_step_s": [9.0, 9.0], "total_s": 27.0},
    {"kind": "timed", "index": 0, "prefill_s": 0.5, "decode_step_s": [0.1, 0.4], "total_s": 1.0},
    {"kind": "timed", "index": 1, "prefill_s": 0.5, "decode_step_s": [0.2, 0.6], "total_s": 1.3},
    {"kind": "timed", "index": 2, "prefill_s": 0.5, "decode_step_s": [0.3], "total_s": 0.8},
)
OUTCOME = Outcome(
    status="ok",
    model={
        "name": "opt-125m",
        "dtype": "float16",
        "parameters": 125_239_296,
        "weight_bytes": 250_478_592,
        "kv_cache_bytes": None,
    },
    plan={
        "fits": True,
        "weight_stored_bytes": 250_478_592,
        "tiers": {
            "device": {"needed_bytes": 300, "available_bytes": None},
            "disk": {"needed_bytes": 1, "available_bytes": 2},
        },
    },
    deepspeed={"train_batch_size": 4},
    metrics={
        "prefill_s": 0.5,
        "generated_tokens_per_s": 48.5,
        "unknown_s": float("nan"),
        "endless_s": float("inf"),
    },
    samples=SAMPLES,
    warnings=("a warning",),
    generated={"text": "Paris is the capital of France."},
)


def config_of(*overrides: str) -> RunConfig:
    """Compose and check the configuration of a run on the CPU."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse_config(compose("config", overrides=["hardware.accelerator=cpu", *overrides]))


def opened(config: RunConfig, job_dir: str = "job") -> TrackedRun:
    """Open a run of this configuration, with an empty job folder."""
    Path(job_dir).mkdir(exist_ok=True)
    return open_run(config, job_dir=Path(job_dir), environment=ENVIRONMENT)


def stored(run: TrackedRun) -> Any:
    """Return the run as its store has it now."""
    assert run.client is not None and run.run_id is not None
    return run.client.get_run(run.run_id)
