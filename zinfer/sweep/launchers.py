"""Know what matters of Hydra's launchers: where they run jobs, and whether they are installed."""

from __future__ import annotations

import importlib.util

from zinfer.config import ConfigError

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
ONE_PROCESS_LAUNCHERS = (BASIC_LAUNCHER, "hydra_plugins.hydra_joblib_launcher.")
"""Beginnings of the launchers that run several jobs in one process, one after the other."""
REMOTE_LAUNCHERS = (
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.Slurm",
    "hydra_plugins.hydra_ray_launcher.",
)
"""Beginnings of the launchers whose jobs may run on other machines."""


def require_installed(launcher: str) -> None:
    """Refuse a launcher whose plugin is not here; Hydra would print a traceback.

    Raises:
        ConfigError: with the package to install.
    """
    package = ".".join(launcher.split(".")[:2])
    try:
        found = importlib.util.find_spec(package)
    except ModuleNotFoundError:
        found = None
    if found is None:
        extra = "ray" if "ray" in package else "launchers"
        raise ConfigError(
            [
                f"hydra.launcher needs {package}, which is not installed. "
                f"Try pip install 'zinfer[{extra}]'"
            ]
        )
