"""Words for people: columns, choices and resources."""

from __future__ import annotations

LABELS = {
    "model.name": "model",
    "weights": "weights",
    "hardware.name": "box",
    "offload.device": "weights on",
    "dtype.weights": "dtype",
    "kv_cache.placement": "KV on",
    "batch.batch_size": "batch",
    "batch.prompt_tokens": "prompt",
    "batch.new_tokens": "new",
    "zero.derivation": "zero",
    "engine.name": "engine",
    "launcher.ranks": "ranks",
}
"""Parameter -> what a table calls it, in the order of the columns. Other parameters go by their
own name."""
ALWAYS_SHOWN = ("model.name", "offload.device", "dtype.weights", "batch.batch_size")
NUMBERS = frozenset(
    {"batch.batch_size", "batch.prompt_tokens", "batch.new_tokens", "launcher.ranks"}
)
"""Choices that are counts."""
NOT_CHOICES = frozenset(
    {"batch.seed", "plan.enforce", "plan.headroom", "sweep.parent_run_id", "dtype.quantiser"}
)
"""Parameters that do not tell configurations apart in a table. The memory plan's knobs decide
whether a run starts, not how fast it is; who packs the weights follows from zero.derivation."""
OF_QUANTISED = frozenset({
    "dtype.group_size", "dtype.symmetric", "dtype.keep", "dtype.eight_bits", "dtype.rounding",
})  # fmt: skip
"""Settings that only runs with quantised weights read; of others they are no choices."""
QUANTISED = ("int8", "int4")
WEIGHTS_ON = {"none": "on device", "cpu": "host memory", "nvme": "NVMe"}
"""Value of offload.device -> a short name."""
WEIGHTS_IN = {"none": "all on device", "cpu": "weights in host memory", "nvme": "weights on NVMe"}
"""Value of offload.device -> part of a sentence."""
NO_STREAM = "(small enough to stay on the device)"
"""Said where offload was asked for and no weight was streamed."""


def offload_order(offload: str) -> tuple[int, str]:
    """Sort places from the fastest to the slowest; others behind them by name."""
    order = list(WEIGHTS_ON)
    return (order.index(offload) if offload in order else len(order), offload)


def column_order(name: str) -> tuple[int, str]:
    """Sort parameters as LABELS has them; others behind them by name."""
    order = list(LABELS)
    return (order.index(name) if name in LABELS else len(order), name)
