"""Read Hydra's composed tree into plain values, and collect every value that cannot be read.

What comes from the environment (`${oc.env:NAME}`) may be a secret. Its text is kept beside its
value, and only the text is ever stored or shown: in job.json, in MLflow, in messages. A reader
resolves it again.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from zinfer.config.sentences import no_value
from zinfer.redact import hide

if TYPE_CHECKING:
    from omegaconf import DictConfig, ListConfig

Keys = tuple[str | int, ...]
"""Keys and list positions from the root to a value: ("tracking", "tags", "note")."""

ENVIRONMENT = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_][A-Za-z0-9_]*)")
OTHER_RESOLVER = re.compile(r"\$\{(?!\s*oc\.env\s*:)[^${}]*:[^${}]*\}")
"""`${now:...}` and `${hydra:...}` exist only while Hydra runs, so their values are stored."""
OUR_OWN = "ZINFER_"
"""Variables of this prefix are no secrets of the user's."""
UNSET = object()


@dataclass(kw_only=True)
class Reading:
    """A tree of plain values, and what was found on the way."""

    tree: dict[str, Any] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    unread: set[str] = field(default_factory=set)
    """Settings, as dotted names, that have no value in the tree because of these problems."""
    from_environment: dict[Keys, str] = field(default_factory=dict)
    """Path -> text with `${oc.env:...}`, to store and show instead of the value."""
    interpolated: dict[Keys, str] = field(default_factory=dict)


def read_tree(composed: DictConfig, *, lenient: bool = False) -> Reading:
    """Resolve every value of the tree by itself, so that one bad value does not hide the others.

    Args:
        lenient: keep the text of what cannot be resolved, as a later reader of stored trees must.
    """
    reading = Reading()
    reading.tree = _mapping(composed, (), reading, lenient)
    secrets = [
        value
        for text in reading.from_environment.values()
        for name in ENVIRONMENT.findall(text)
        if (value := os.environ.get(name))
    ]
    for path, text in reading.interpolated.items():  # ${tracking.uri} of a uri from the environment
        value = str(value_at(reading.tree, path))
        if path not in reading.from_environment and any(secret in value for secret in secrets):
            reading.from_environment[path] = text
    return reading


def value_at(tree: Any, path: Keys) -> Any:
    """Follow a path into a tree; None where it does not lead anywhere."""
    for key in path:
        try:
            tree = tree[key]
        except (KeyError, IndexError, TypeError):
            return None
    return tree


def dotted(path: Keys) -> str:
    """Name a setting as people type it: tracking.tags.note."""
    return ".".join(str(key) for key in path)


def _mapping(node: DictConfig, path: Keys, reading: Reading, lenient: bool) -> dict[str, Any]:
    values = {}
    for key in node:
        value = _value(node, key, (*path, str(key)), reading, lenient)
        if value is not UNSET:
            values[str(key)] = value
    return values


def _value(
    node: DictConfig | ListConfig, key: Any, path: Keys, reading: Reading, lenient: bool
) -> Any:
    """Return one value, resolved; UNSET after a problem."""
    from omegaconf import DictConfig, ListConfig, OmegaConf
    from omegaconf.errors import OmegaConfBaseException

    if OmegaConf.is_missing(node, key):
        _unread(reading, path, no_value(path))
        return UNSET
    try:
        if OmegaConf.is_interpolation(node, key):
            return _resolved(node, key, path, reading)
        child = node[key]
    except (OmegaConfBaseException, ValueError, TypeError) as error:
        text = _text(node, key)
        if lenient:
            return text
        _unread(reading, path, _problem(dotted(path), text, error))
        return UNSET
    if isinstance(child, DictConfig):
        return _mapping(child, path, reading, lenient)
    if isinstance(child, ListConfig):
        items = (_value(child, at, (*path, at), reading, lenient) for at in range(len(child)))
        return [item for item in items if item is not UNSET]
    return child


def _resolved(node: DictConfig | ListConfig, key: Any, path: Keys, reading: Reading) -> Any:
    """Return the value of an interpolation. Raise OmegaConf's own errors."""
    from omegaconf import OmegaConf

    text = _text(node, key)
    value = node[key]
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=True, throw_on_missing=True)
    reading.interpolated[path] = text
    names = [name for name in ENVIRONMENT.findall(text) if not name.startswith(OUR_OWN)]
    if names:
        reading.from_environment[path] = OTHER_RESOLVER.sub(_resolve_now, text)
        for name in names:
            hide(os.environ.get(name, ""), f"${{oc.env:{name}}}")
    return value


def _resolve_now(found: re.Match[str]) -> str:
    from omegaconf import OmegaConf

    return str(OmegaConf.create({"value": found.group()}).value)


def _text(node: Any, key: Any) -> str:
    """Return a value as it was typed."""
    return str(node._get_node(key)._value())


def _unread(reading: Reading, path: Keys, problem: str) -> None:
    reading.problems.append(problem)
    reading.unread.add(dotted(path))


def _problem(name: str, text: str, error: Exception) -> str:
    """Say in a sentence that an interpolation leads nowhere."""
    absent = [variable for variable in ENVIRONMENT.findall(text) if variable not in os.environ]
    if absent:
        variables = " and ".join(absent)
        return (
            f"{name}={text}: the environment has no variable {variables}. "
            f"Set it: export {absent[0]}=VALUE, or set {name}=VALUE"
        )
    said = str(error).splitlines()[0] if str(error) else type(error).__name__
    return f"{name}={text} leads to no value: {said}. Set {name}=VALUE"


# Stored trees

DOLLAR = re.compile(r"(\\*)\$\{")


def escaped(tree: dict[str, Any]) -> dict[str, Any]:
    """Mark every `${` as plain text, for a reader that resolves interpolations."""
    marked = _map_text(tree, lambda text: DOLLAR.sub(r"\1\1\\${", text))
    assert isinstance(marked, dict)
    return marked


def with_texts(tree: dict[str, Any], from_environment: dict[Keys, str]) -> dict[str, Any]:
    """Put texts with `${oc.env:...}` in place of their values. Changes the tree, and returns it."""
    for path, text in from_environment.items():
        if value_at(tree, path) is not None:
            value_at(tree, path[:-1])[path[-1]] = text
    return tree


def is_interpolated(tree: Any) -> bool:
    """Tell if some text of the tree has a `${`, escaped or not."""
    return any("${" in text for text in _texts(tree))


def _texts(tree: Any) -> Iterator[str]:
    if isinstance(tree, str):
        yield tree
    elif isinstance(tree, dict):
        for value in tree.values():
            yield from _texts(value)
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value)


def _map_text(tree: Any, change: Any) -> Any:
    if isinstance(tree, str):
        return change(tree)
    if isinstance(tree, dict):
        return {key: _map_text(value, change) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_map_text(value, change) for value in tree]
    return tree
