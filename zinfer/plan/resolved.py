"""Decide the model and the dtype that a run computes in, and describe the model."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from zinfer.config import ConfigError, RunConfig
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import (
    ModelSpec,
    hidden_bytes,
    kv_bytes_per_token,
    kv_cache_bytes,
    kv_cache_bytes_paper,
    model_spec,
)
from zinfer.plan.problems import spec_problems


def resolved_spec(config: RunConfig, hardware: Hardware, warn: Callable[[str], None]) -> ModelSpec:
    """Describe the model in the dtype that this run computes in.

    Raises:
        ConfigError: the model cannot be read, or cannot generate this batch (spec_problems).
    """
    try:
        spec = model_spec(
            config.model,
            compute_dtype=None if config.dtype.compute == "auto" else config.dtype.compute,
        )
    except ValueError as error:
        raise ConfigError([str(error)]) from error
    if spec.text_part_of is not None:
        warn(
            f"{spec.text_part_of} is multimodal: only its text part ({spec.architecture}) is "
            "counted and run, without its encoders for images or sound"
        )
    if problems := spec_problems(spec, config):
        raise ConfigError(problems)
    if (
        config.dtype.compute == "auto"
        and hardware.name == "detect"
        and spec.dtype not in hardware.device_dtypes
    ):
        warn(
            f"dtype=auto: {hardware.device_name} has no {spec.dtype}, so {config.model.name} "
            "runs in bfloat16"
        )
        return replace(spec, dtype="bfloat16")
    return spec


def describe(spec: ModelSpec, config: RunConfig) -> dict[str, Any]:
    """Describe the architecture for people and scripts. Unknown is None."""
    rows, tokens = config.batch.batch_size, config.batch.prompt_tokens + config.batch.new_tokens
    return {
        "name": spec.name,
        "model_type": spec.model_type,
        "architecture": spec.architecture,
        "dtype": spec.dtype,
        "parameters": spec.num_parameters,
        "active_parameters": spec.num_active_parameters,
        "layers": spec.num_layers,
        "hidden_size": spec.hidden_size,
        "attention_heads": spec.num_attention_heads,
        "kv_heads": spec.num_kv_heads,
        "vocab_size": spec.vocab_size,
        "weight_bytes": spec.weight_bytes,
        "kv_cache_bytes_per_token": kv_bytes_per_token(spec),
        "kv_cache_bytes": kv_cache_bytes(spec, rows, tokens),
        "kv_cache_bytes_paper": kv_cache_bytes_paper(spec, rows, tokens),
        "kv_cache_unknown_reason": spec.kv_unknown_reason,
        "hidden_bytes": hidden_bytes(spec, rows, tokens),
    }
