"""RunConfig and its parts, and the only door from YAML to code.

Hydra composes plain YAML (conf/); `parse_config` checks the composed tree once and reports every problem at once; nothing behind it
sees a DictConfig. This module imports neither torch nor transformers nor deepspeed, so a bad configuration is refused within a second.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from zinfer.config.problems import config_problems
from zinfer.config.run_config import (
    ITEMSIZE_BYTES,
    METHOD_VERSION,
    QUANTISED_BITS,
    RUN_CONFIG,
    STRICT,
    BatchConfig,
    ConfigError,
    DtypeConfig,
    EngineConfig,
    FloatDtype,
    HardwareConfig,
    KvCacheConfig,
    LauncherConfig,
    ModelConfig,
    OffloadConfig,
    OffloadDevice,
    PlanConfig,
    RunConfig,
    SweepConfig,
    TrackingConfig,
    ZeroConfig,
    config_key,
    config_to_tree,
)

if TYPE_CHECKING:
    from omegaconf import DictConfig

__all__ = [
    "ITEMSIZE_BYTES",
    "METHOD_VERSION",
    "QUANTISED_BITS",
    "RUN_CONFIG",
    "STRICT",
    "BatchConfig",
    "ConfigError",
    "DtypeConfig",
    "EngineConfig",
    "FloatDtype",
    "HardwareConfig",
    "KvCacheConfig",
    "LauncherConfig",
    "ModelConfig",
    "OffloadConfig",
    "OffloadDevice",
    "PlanConfig",
    "RunConfig",
    "SweepConfig",
    "TrackingConfig",
    "ZeroConfig",
    "config_from_tree",
    "config_key",
    "config_to_tree",
    "parse_config",
]


def parse_config(composed: DictConfig) -> RunConfig:
    """Check Hydra's composed tree once.

    Raises:
        ConfigError: with every problem found, not only the first.
    """
    from omegaconf import OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    missing = sorted(OmegaConf.missing_keys(composed))
    if missing:
        raise ConfigError([f"{key} has no value. Type {key}=VALUE{_hint(key)}" for key in missing])
    try:
        tree = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except OmegaConfBaseException as error:
        raise ConfigError([str(error).splitlines()[0]]) from None
    assert isinstance(tree, dict)
    return config_from_tree(tree)


def config_from_tree(tree: Mapping[Any, Any]) -> RunConfig:
    """The same from plain mappings (a job's stored configuration). Raises ConfigError."""
    try:
        config = RUN_CONFIG.validate_python(dict(tree))
    except ValidationError as error:
        raise ConfigError([_validation_problem(detail) for detail in error.errors()]) from None
    problems = config_problems(config)
    if problems:
        raise ConfigError(problems)
    return config


def _validation_problem(detail: Any) -> str:
    """One of pydantic's findings as a sentence that names the override to type."""
    name = ".".join(str(part) for part in detail["loc"])
    given = detail.get("input")
    match detail["type"]:
        case "literal_error":
            choices = (
                str(detail["ctx"]["expected"]).replace(" or ", ", ").replace("'", "").split(", ")
            )
            return f"{name}={given} is not one of {', '.join(choices)}. Type {name}={choices[0]}"
        case "unexpected_keyword_argument":
            return (
                f"{name} is not a setting of zinfer. Drop it; `zinfer --cfg job` shows all settings"
            )
        case "missing" | "missing_keyword_only_argument" | "missing_argument":
            return f"{name} has no value. Type {name}=VALUE{_hint(name)}"
        case _:
            return f"{name}={given} is wrong: {detail['msg'][:1].lower()}{detail['msg'][1:]}. Type {name}=VALUE"


def _hint(name: str) -> str:
    """An example value for settings that people forget."""
    examples = {
        "model.source": "model.source=/path/to/a/folder or model.source=HUB/ID",
        "offload.nvme_path": "offload.nvme_path=/local_nvme",
        "tracking.uri": "tracking.uri=http://127.0.0.1:5000",
    }
    return f", e.g. {examples[name]}" if name in examples else ""
