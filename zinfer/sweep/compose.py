"""Compose the jobs of a sweep as Hydra will, with the folder that Hydra will give to each."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from zinfer.config import ConfigError, RunConfig, parse_config
from zinfer.config.hydra_errors import composition_problems
from zinfer.sweep.folders import require_folders

BASIC_SWEEPER = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


@dataclass(frozen=True, kw_only=True)
class ComposedJob:
    """One job as Hydra composes it; its interpolations are not resolved yet."""

    num: int
    overrides: list[str]
    tree: DictConfig
    folder: Path

    def checked(self) -> RunConfig:
        """Resolve and check the job's configuration.

        Raises:
            ConfigError: with every problem found.
        """
        with as_hydra_config(self.tree) as own, problems_of_interpolation():
            return parse_config(own)


def is_basic_sweeper(master: DictConfig) -> bool:
    """Return whether Hydra's own sweeper chooses the jobs, which are then known beforehand."""
    return bool(master.hydra.sweeper._target_ == BASIC_SWEEPER)


def compose_jobs(master: DictConfig) -> list[ComposedJob]:
    """Return every job, in the launcher's order.

    Another sweeper than Hydra's own gives one entry: what all its jobs have in common.

    Raises:
        ConfigError: Hydra cannot compose a job, there is none, or their folders are unusable.
    """
    from hydra.errors import HydraException

    loader = GlobalHydra.instance().config_loader()
    try:
        jobs = [
            _composed(loader, master, overrides, num)
            for num, overrides in enumerate(job_overrides(loader, master))
        ]
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composing_problems(error, master)) from error
    if is_basic_sweeper(master):
        require_folders({job.num: job.folder for job in jobs}.items())
    return jobs


def typed_overrides(master: DictConfig) -> list[str]:
    """Return what is set for this sweep, as it was typed: ${...} in it belongs to the jobs."""
    params = OmegaConf.select(master, "hydra.sweeper.params")
    given = OmegaConf.to_container(params, resolve=False) if params else {}
    assert isinstance(given, dict)
    return [*(f"{key!s}={value}" for key, value in given.items()), *task_overrides(master.hydra)]


def task_overrides(hydra: Any) -> list[str]:
    """Return Hydra's list of overrides without resolving what is in them."""
    typed = OmegaConf.to_container(hydra.overrides.task, resolve=False)
    assert isinstance(typed, list)
    return [str(text) for text in typed]


def job_overrides(loader: Any, master: DictConfig) -> list[list[str]]:
    """Return the overrides of each job: the product of everything that is swept.

    Raises:
        ConfigError: the product is empty.
    """
    from hydra._internal.core_plugins.basic_sweeper import BasicSweeper
    from hydra.core.override_parser.overrides_parser import OverridesParser

    parsed = OverridesParser.create(config_loader=loader).parse_overrides(typed_overrides(master))
    if not is_basic_sweeper(master):
        parsed = [override for override in parsed if not override.is_sweep_override()]
    jobs: list[list[str]] = BasicSweeper.split_arguments(parsed, None)[0]
    if not jobs:
        empty = [
            str(override.input_line)
            for override in parsed
            if override.is_sweep_override() and not list(override.sweep_string_iterator())
        ]
        raise ConfigError(
            [
                f"{text} stands for no value, so this sweep has no job. "
                f"Set {text.partition('=')[0]}=A,B with values that exist"
                for text in empty
            ]
        )
    return jobs


def setting(config: DictConfig, name: str, default: object) -> object:
    """Return a setting of a tree that may not resolve; what is wrong with it is said elsewhere."""
    try:
        found = OmegaConf.select(config, name)
    except OmegaConfBaseException:
        return default
    return default if found is None else found


def sweep_folder(config: DictConfig) -> Path:
    """Return the sweep's own folder: hydra.sweep.dir, absolute.

    Raises:
        ConfigError: the setting cannot be resolved.
    """
    with problems_of_interpolation("hydra.sweep.dir"):
        return Path(str(config.hydra.sweep.dir)).absolute()


def _composed(loader: Any, master: DictConfig, overrides: list[str], num: int) -> ComposedJob:
    """Compose one job as its launcher will, with its number and folder."""
    tree = loader.load_sweep_config(master, overrides)
    with read_write(tree.hydra), open_dict(tree.hydra):
        tree.hydra.job.id = tree.hydra.job.num = num
    with as_hydra_config(tree), problems_of_interpolation("hydra.sweep.subdir"):
        folder = os.path.join(str(tree.hydra.sweep.dir), str(tree.hydra.sweep.subdir))
    with read_write(tree.hydra), open_dict(tree.hydra):
        tree.hydra.runtime.output_dir = os.path.abspath(folder)
    own = [override for override in overrides if not override.startswith("hydra.")]
    return ComposedJob(
        num=num, overrides=own, tree=tree, folder=Path(tree.hydra.runtime.output_dir)
    )


@contextmanager
def as_hydra_config(composed: DictConfig) -> Iterator[DictConfig]:
    """Yield the job's own settings, while ${hydra:...} in them resolves to this job."""
    before = HydraConfig.instance().cfg
    HydraConfig.instance().set_config(composed)
    try:
        own = composed.copy()
        with read_write(own), open_dict(own):
            del own["hydra"]
        yield own
    finally:
        HydraConfig.instance().cfg = before


@contextmanager
def problems_of_interpolation(setting: str = "") -> Iterator[None]:
    """Turn OmegaConf's errors, as of ${oc.env:UNSET}, into ConfigError."""
    try:
        yield
    except OmegaConfBaseException as error:
        start = f"{setting}: " if setting else ""
        raise ConfigError([start + sentence(error)]) from error


def composing_problems(error: Exception, master: DictConfig) -> list[str]:
    """Say why Hydra cannot compose a job of this sweep, with what to set."""
    if isinstance(error, OmegaConfBaseException):
        return [sentence(error)]
    return composition_problems(error, typed_overrides(master)) or [sentence(error)]


def sentence(error: Exception) -> str:
    """Return the message of a foreign exception in one line, with the setting it is about."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, OmegaConfBaseException) and error.full_key:
        said = lines[0].rpartition("while resolving interpolation: ")[2] if lines else ""
        return f"{error.full_key}: {said.strip(chr(34))}"
    return " ".join(lines) or type(error).__name__
