"""Runs as a store returns them, made by hand for tests of comparisons."""

from __future__ import annotations

from multirun_analysis.runs import Run


def run(
    rate: float | None = None,
    *,
    status: str = "ok",
    reason: str | None = None,
    tags: dict[str, str] | None = None,
    **choices: str,
) -> Run:
    """Invent a run of opt-30b from host memory; choices (offload_device=...) change it."""
    params = {
        "model.name": "opt-30b",
        "weights": "dummy",
        "offload.device": "cpu",
        "dtype.weights": "bfloat16",
        "batch.batch_size": "8",
    }
    params |= {"batch.prompt_tokens": "512", "batch.new_tokens": "32", "task": "run"}
    params |= {name.replace("_", ".", 1): value for name, value in choices.items()}
    metrics = (
        {}
        if rate is None
        else {
            "generated_tokens_per_s": rate,
            "generated_tokens_per_s_stddev": rate / 100,
            "timed_runs": 3.0,
        }
    )
    metrics |= {} if rate is None else {"decode_step_s": 8 / rate, "weight_stored_bytes": 6e10}
    known = {
        "zinfer.method_version": "1",
        "zinfer.hardware": "box",
        "zinfer.device": "A6000",
        "zinfer.commit": "aaaaaaa1",
        "zinfer.dirty": "false",
    }
    name = f"run {id(params)}"
    return Run(
        run_id=name,
        name=name,
        experiment="zinfer",
        started=None,
        status=status,
        reason=reason,
        params=params,
        metrics=metrics,
        tags=known | (tags or {}),
    )
