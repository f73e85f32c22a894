"""Know of sweepers that search, such as Optuna: what they are told, and what they found.

They choose each job by the results of the jobs before it. A job's result is one of its metrics:
sweep.objective. A job that has none is told as failed, so it leads the search nowhere.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from zinfer.config import ConfigError
from zinfer.job.outcome import Json
from zinfer.sweep.record import Direction, Sweep, ended_well

OPTUNA = "hydra_plugins.hydra_optuna_sweeper."
DIRECTIONS = ("hydra.sweeper.direction", "hydra.sweeper.optuna_config.direction")
"""Settings of hydra-optuna-sweeper, and of hydra-optuna-mlflow-sweeper."""
TRIALS = ("hydra.sweeper.n_trials", "hydra.sweeper.optuna_config.n_trials")
"""The same for the number of jobs that they choose."""
MORE_IS_BETTER = "_tokens_per_s"


def require_sweeper(master: DictConfig) -> None:
    """Refuse a sweeper that is not installed, or that would look for the slowest job.

    Raises:
        ConfigError: with what to install or to set.
    """
    target = str(master.hydra.sweeper._target_)
    if target.startswith(OPTUNA) and not _is_there(OPTUNA.rstrip(".")):
        raise ConfigError(
            [
                f"hydra.sweeper needs {OPTUNA.rstrip('.')}, which is not installed. "
                "Try pip install 'zinfer[search]'"
            ]
        )
    objective = str(OmegaConf.select(master, "sweep.objective"))
    if direction_of(master) == "minimize" and objective.endswith(MORE_IS_BETTER):
        raise ConfigError(
            [
                f"{_direction_setting(master)}=minimize with sweep.objective={objective} would "
                f"look for the slowest job. Set {_direction_setting(master)}=maximize"
            ]
        )


def direction_of(master: DictConfig) -> Direction | None:
    """Return which end of the objective the sweeper looks for; None for Hydra's own sweeper."""
    setting = _direction_setting(master)
    if setting is None:
        return None
    found = OmegaConf.select(master, setting)
    said = str(getattr(found, "name", found)).lower()
    if said not in ("minimize", "maximize"):
        raise ConfigError(
            [f"{setting}={found} is not minimize or maximize: a job has one sweep.objective"]
        )
    return "maximize" if said == "maximize" else "minimize"


def trials_of(master: DictConfig) -> int | None:
    """Return how many jobs a searching sweeper chooses; None where it does not say."""
    setting = _first_set(master, TRIALS)
    found = None if setting is None else OmegaConf.select(master, setting)
    return found if isinstance(found, int) and found > 0 else None


def _direction_setting(master: DictConfig) -> str | None:
    return _first_set(master, DIRECTIONS)


def _first_set(master: DictConfig, settings: Iterable[str]) -> str | None:
    """Return the first of these settings that this sweeper has, and that is no null."""
    for setting in settings:
        try:
            if OmegaConf.select(master, setting) is not None:
                return setting
        except OmegaConfBaseException:
            continue
    return None


def _is_there(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:
        return False


def objective_of(document: Json | None, objective: str) -> float | None:
    """Return this metric of a result.json or reused.json.

    None where the job has not ended well, or has no such metric.
    """
    if document is None or not ended_well(document):
        return None
    found = (document.get("metrics") or {}).get(objective)
    return None if found is None else float(found)


def best_line(sweep: Sweep, rows: Iterable[tuple[int, list[str], Json | None]]) -> str:
    """Say which job was best, of how many that could be compared."""
    rows = list(rows)
    values = {
        num: value
        for num, _, document in rows
        if (value := objective_of(document, sweep.objective)) is not None
    }
    if not values:
        return f"no job has {sweep.objective}, so none is best"
    pick = max if sweep.direction == "maximize" else min
    best = pick(values, key=lambda num: values[num])
    overrides = next(overrides for num, overrides, _ in rows if num == best)
    return (
        f"best of {len(values)} jobs with {sweep.objective} ({len(rows) - len(values)} without): "
        f"job {best} with {values[best]:.4g}: " + " ".join(sweep.varying(overrides))
    )
