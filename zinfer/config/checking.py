"""Check a composed or stored tree, and write a configuration back as one.

A wrong value is replaced by one that is right in itself, so that every problem is found in one
pass.
"""

from __future__ import annotations

from collections.abc import Mapping
from copy import deepcopy
from dataclasses import MISSING, replace
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError

from zinfer.config.problems import config_problems
from zinfer.config.reading import (
    Reading,
    dotted,
    escaped,
    is_interpolated,
    read_tree,
    value_at,
    with_texts,
)
from zinfer.config.run_config import RUN_CONFIG, ConfigError, RunConfig, config_to_tree
from zinfer.config.sentences import choices_in, usable_value, validation_problem
from zinfer.redact import hide_named

if TYPE_CHECKING:
    from omegaconf import DictConfig

ROUNDS = 4
"""Validate at most so often: each round replaces what was wrong, to see what else is."""


def parse_config(composed: DictConfig) -> RunConfig:
    """Check Hydra's composed tree once.

    Raises:
        ConfigError: with every problem found, of every sort, not only the first.
    """
    return _checked(read_tree(composed))


def config_from_tree(tree: Mapping[Any, Any]) -> RunConfig:
    """Check a tree of plain values, as config_to_tree makes them. Raises ConfigError."""
    return _checked(Reading(tree=deepcopy(dict(tree))))


def config_to_shown(config: RunConfig) -> dict[str, Any]:
    """Turn a configuration into JSON values for people: `${oc.env:...}` stays unresolved."""
    return with_texts(config_to_tree(config), config.from_environment)


def config_to_stored(config: RunConfig) -> dict[str, Any]:
    """Do the same for a file that config_from_stored reads: mark other text with `${` as text."""
    return with_texts(escaped(config_to_tree(config)), config.from_environment)


def config_from_stored(tree: Mapping[Any, Any]) -> RunConfig:
    """Read what config_to_stored wrote, with the variables of this environment.

    A variable that is not set here leaves its text as the value. Raises ConfigError.
    """
    if not is_interpolated(dict(tree)):
        return config_from_tree(tree)
    from omegaconf import OmegaConf

    return _checked(read_tree(OmegaConf.create(dict(tree)), lenient=True))


def _checked(reading: Reading) -> RunConfig:
    """Return the configuration, or raise ConfigError with the problems of all layers together.

    A wrong value is replaced by one that is right in itself, so that the next layer can be checked
    too; what that layer says of replaced settings is left out.
    """
    hide_named(reading.tree)
    problems, replaced = list(reading.problems), set(reading.unread)
    config = None
    for _ in range(ROUNDS):
        try:
            config = RUN_CONFIG.validate_python(reading.tree)
            break
        except ValidationError as error:
            for detail in error.errors():
                path = tuple(detail["loc"])
                if dotted(path) not in replaced:
                    problems.append(validation_problem(detail, _given(detail, reading)))
                replaced.add(dotted(path))
                _replace(path, detail, reading.tree)
    if config is not None:
        problems += [
            problem.text
            for problem in config_problems(config)
            if not any(_concerns(name, replaced) for name in problem.about)
        ]
    if problems or config is None:
        raise ConfigError(list(dict.fromkeys(problems)))
    return replace(config, from_environment=reading.from_environment)


def _given(detail: Any, reading: Reading) -> str:
    """Return the wrong value as people typed it, and as it may be shown."""
    path, value = tuple(detail["loc"]), detail.get("input")
    if path in reading.from_environment:
        return reading.from_environment[path]
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def _replace(path: tuple[Any, ...], detail: Any, tree: dict[str, Any]) -> None:
    """Put a value there that is right by itself, or nothing at all."""
    parent = value_at(tree, path[:-1])
    if not isinstance(parent, dict):
        return
    context = detail.get("ctx") or {}
    if detail["type"] == "literal_error":
        first = choices_in(str(context["expected"]))[0]
        parent[path[-1]] = {"true": True, "false": False}.get(first, first)
    elif context.get("instead") is not None:
        parent[path[-1]] = context["instead"]
    elif (usable := usable_value(path)) is not MISSING:
        parent[path[-1]] = usable
    else:
        parent.pop(path[-1], None)


def _concerns(name: str, replaced: set[str]) -> bool:
    """Tell if the setting, or one of its group, was replaced."""
    return name in replaced or any(other.startswith(f"{name}.") for other in replaced)
