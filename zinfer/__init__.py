"""Measure and predict ZeRO-Inference: generation with weights or KV cache beyond the accelerator.

The command is `zinfer`; the same from Python, each function in docs/python.md:

    config = zinfer.compose(model="opt-125m", offload="cpu")
    print(zinfer.plan(config).fits, zinfer.run(config).metrics["generated_tokens_per_s"])

Importing this package imports nothing else: zinfer.api is loaded when its first name is used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zinfer.api import (
        ConfigError,
        Plan,
        Result,
        RunConfig,
        compose,
        load_model_config,
        load_runs,
        load_tokenizer,
        model_spec,
        plan,
        run,
        sweep,
    )

__version__ = "0.1.0"
__all__ = [
    "ConfigError",
    "Plan",
    "Result",
    "RunConfig",
    "__version__",
    "compose",
    "load_model_config",
    "load_runs",
    "load_tokenizer",
    "model_spec",
    "plan",
    "run",
    "sweep",
]


def __getattr__(name: str) -> Any:
    """Load the Python door when one of its names is first used."""
    if name not in __all__:
        raise AttributeError(f"module 'zinfer' has no attribute {name!r}")
    value = getattr(import_module("zinfer.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
