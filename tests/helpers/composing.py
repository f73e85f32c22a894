"""Compose configurations in tests as the command line does."""

from __future__ import annotations

from pathlib import Path

from hydra import compose, initialize_config_dir

from zinfer.config import RunConfig, parse_config

CONF = Path(__file__).parents[2] / "conf"


def composed(*overrides: str) -> RunConfig:
    """Compose and check the configuration of these overrides.

    Hydra's own output folder does not exist here, so offload=nvme gets a path.
    """
    settings = list(overrides)
    if "offload=nvme" in settings and not any(
        setting.startswith("offload.nvme_path") for setting in settings
    ):
        settings.append("offload.nvme_path=/local_nvme")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return parse_config(compose("config", overrides=settings))


def choices(group: str) -> list[str]:
    """Return the names of the files of a config group, without .yaml."""
    return sorted(path.stem for path in (CONF / group).glob("*.yaml"))
