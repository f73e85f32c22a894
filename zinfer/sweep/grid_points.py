"""Compose the points of a grid of plans, thousands of them in seconds.

Composing a job through Hydra takes longer than planning it. So each combination of config groups
is composed once, and the other overrides are set in the plain tree that this gives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from zinfer.config import ConfigError, RunConfig, config_from_tree, parse_config
from zinfer.sweep.compose import (
    as_hydra_config,
    composing_problems,
    job_overrides,
    problems_of_interpolation,
    typed_overrides,
)

if TYPE_CHECKING:
    from hydra.core.override_parser.types import Override


@dataclass(frozen=True, kw_only=True)
class GridPoint:
    """One point: what was swept, and its checked configuration or why it has none."""

    names: dict[str, str]
    config: RunConfig | None = None
    problems: tuple[str, ...] = ()


def composed_points(master: DictConfig, folder: Path) -> Iterator[GridPoint]:
    """Yield every point in the order of a sweep.

    Raises:
        ConfigError: Hydra cannot compose a point, or there is none.
    """
    from hydra.core.override_parser.overrides_parser import OverridesParser
    from hydra.errors import HydraException

    loader = GlobalHydra.instance().config_loader()
    parser = OverridesParser.create(config_loader=loader)
    try:
        typed = parser.parse_overrides(typed_overrides(master))
        swept = {part.get_key_element() for part in typed if part.is_sweep_override()}
        compose = GridComposer(loader, master, folder)
        for job in job_overrides(loader, master):
            parsed = parser.parse_overrides(job)
            names = {
                part.get_key_element().lstrip("+"): str(part.value())
                for part in parsed
                if part.get_key_element() in swept
            }
            try:
                yield GridPoint(names=names, config=compose.point(job, parsed))
            except ConfigError as error:
                yield GridPoint(names=names, problems=tuple(error.problems))
    except (HydraException, OmegaConfBaseException) as error:
        raise ConfigError(composing_problems(error, master)) from error


class GridComposer:
    """Composes each combination of groups once."""

    def __init__(self, loader: Any, master: DictConfig, folder: Path) -> None:
        self._loader = loader
        self._master = master
        self._folder = folder
        self._trees: dict[tuple[str, ...], dict[str, Any]] = {}

    def point(self, job: list[str], parsed: list[Override]) -> RunConfig:
        """Return the checked configuration of one job.

        Raises:
            ConfigError: with every problem found.
        """
        groups = tuple(text for text, part in zip(job, parsed, strict=True) if not is_value(part))
        if groups not in self._trees:
            self._trees[groups] = self._tree(list(groups))
        tree = copy.deepcopy(self._trees[groups])
        if not all(put(tree, part) for part in parsed if is_value(part)):
            tree = self._tree(job)
        return config_from_tree(tree)

    def _tree(self, overrides: list[str]) -> dict[str, Any]:
        """Return the resolved tree of one job."""
        composed = self._loader.load_sweep_config(self._master, overrides)
        with read_write(composed.hydra), open_dict(composed.hydra):
            composed.hydra.job.id = composed.hydra.job.num = 0
            composed.hydra.runtime.output_dir = str(self._folder / "0")
        with as_hydra_config(composed) as own, problems_of_interpolation():
            parse_config(own)
            tree = OmegaConf.to_container(own, resolve=True, throw_on_missing=True)
        assert isinstance(tree, dict)
        return {str(key): value for key, value in tree.items()}


def is_value(override: Override) -> bool:
    """Return whether this sets a plain `a.b=value`.

    A choice of a config file, something added or deleted, and ${...} are not plain.
    """
    from hydra.core.override_parser.types import OverrideType

    key = override.get_key_element()
    if override.type != OverrideType.CHANGE or override.package or "." not in key:
        return False
    return not key.startswith("hydra.") and "${" not in str(override.value())


def put(tree: dict[str, Any], override: Override) -> bool:
    """Set the value where the key already is; return False where it is not."""
    *path, last = override.get_key_element().split(".")
    for name in path:
        tree = tree.get(name) or {}
    if last not in tree:
        return False
    value = override.value()
    plain = isinstance(value, (int, float, bool, list, dict, type(None)))
    tree[last] = value if plain else str(value)
    return True
