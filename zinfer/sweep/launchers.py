"""Know what matters of Hydra's launchers: where they run jobs, and whether they are installed."""

from __future__ import annotations

import importlib.util
import shutil

from zinfer.config import ConfigError

BASIC_LAUNCHER = "hydra._internal.core_plugins.basic_launcher.BasicLauncher"
ONE_PROCESS_LAUNCHERS = (BASIC_LAUNCHER, "hydra_plugins.hydra_joblib_launcher.")
"""Beginnings of the launchers that run several jobs in one process, one after the other."""
REMOTE_LAUNCHERS = (
    "hydra_plugins.hydra_submitit_launcher.submitit_launcher.Slurm",
    "hydra_plugins.hydra_ray_launcher.",
)
"""Beginnings of the launchers whose jobs may run on other machines."""


SLURM_LAUNCHER = "hydra_plugins.hydra_submitit_launcher.submitit_launcher.SlurmLauncher"


def require_launcher(launcher: str) -> None:
    """Refuse a launcher that cannot launch here; Hydra would print a traceback.

    Raises:
        ConfigError: with what to install, or where to run this.
    """
    if launcher == BASIC_LAUNCHER:
        return
    if not launcher.startswith("hydra_plugins."):
        raise ConfigError(
            [
                f"hydra.launcher._target_={launcher} is no launcher that Hydra accepts: "
                "the module must be in the package hydra_plugins (docs/extending.md)"
            ]
        )
    require_installed(launcher)
    if launcher == SLURM_LAUNCHER and shutil.which("sbatch") is None:
        raise ConfigError(
            [
                "this launcher needs Slurm's command sbatch, which is not on PATH. Run zinfer on a "
                "machine that submits to Slurm, or set hydra/launcher=basic"
            ]
        )


def require_installed(launcher: str) -> None:
    """Refuse a launcher whose plugin is not here.

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
