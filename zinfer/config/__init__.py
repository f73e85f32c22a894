"""The only door from Hydra's YAML to code: a composed tree comes in, a RunConfig goes out.

A tree that cannot run raises ConfigError with every problem at once, each with the override to set.
Behind this door nobody sees a DictConfig. May import the leaves only, and nothing heavy: a bad
configuration is refused within a second.

Its names are loaded when they are first used: `zinfer --help` needs no pydantic.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from zinfer.config.checking import (
        config_from_stored,
        config_from_tree,
        config_to_shown,
        config_to_stored,
        parse_config,
    )
    from zinfer.config.engines import OffloadDevice
    from zinfer.config.run_config import (
        METHOD_VERSION,
        RUN_CONFIG,
        ConfigError,
        RunConfig,
        config_key,
        config_to_tree,
    )
    from zinfer.config.setting_groups import (
        ITEMSIZE_BYTES,
        QUANTISED_BITS,
        STRICT,
        BatchConfig,
        DtypeConfig,
        EngineConfig,
        FloatDtype,
        HardwareConfig,
        KvCacheConfig,
        LauncherConfig,
        ModelConfig,
        OffloadConfig,
        PlanConfig,
        QualityConfig,
        SweepConfig,
        TrackingConfig,
        ZeroConfig,
    )

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
    "QualityConfig",
    "RunConfig",
    "SweepConfig",
    "TrackingConfig",
    "ZeroConfig",
    "config_from_stored",
    "config_from_tree",
    "config_key",
    "config_to_shown",
    "config_to_stored",
    "config_to_tree",
    "parse_config",
]

CHECKING = (
    "config_from_stored",
    "config_from_tree",
    "config_to_shown",
    "config_to_stored",
    "parse_config",
)
"""Names of checking.py."""
RUN = ("METHOD_VERSION", "RUN_CONFIG", "ConfigError", "RunConfig", "config_key", "config_to_tree")
"""Names of run_config.py; all others are setting_groups.py's."""


def __getattr__(name: str) -> Any:
    """Load one of the names above."""
    if name not in __all__:
        raise AttributeError(f"module 'zinfer.config' has no attribute {name!r}")
    module = "checking" if name in CHECKING else "run_config" if name in RUN else "setting_groups"
    value = getattr(import_module(f"zinfer.config.{module}"), name)
    globals()[name] = value
    return value
