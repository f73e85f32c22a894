"""conf/config.yaml and the dataclasses hold the same defaults."""

from __future__ import annotations

from dataclasses import MISSING, fields, is_dataclass
from typing import Any, get_type_hints

import pytest
import yaml

from tests.helpers.composing import CONF
from zinfer.config import RunConfig

GROUPS = {name: kind for name, kind in get_type_hints(RunConfig).items() if is_dataclass(kind)}
BASE: dict[str, Any] = yaml.safe_load((CONF / "config.yaml").read_text())
FROM_HYDRA = {"sweep.parent_run_id"}
"""Settings whose default in the YAML is an interpolation."""


def defaults_of(kind: type) -> dict[str, Any]:
    """Return the fields of a dataclass that have a default, with it."""
    found = {}
    for item in fields(kind):
        if item.default is not MISSING:
            found[item.name] = item.default
        elif item.default_factory is not MISSING:
            found[item.name] = item.default_factory()
    return found


CASES = [(group, name) for group, kind in GROUPS.items() for name in defaults_of(kind)]


@pytest.mark.parametrize(("group", "name"), CASES)
def test_the_yaml_and_the_dataclass_have_the_same_default(group: str, name: str) -> None:
    if f"{group}.{name}" in FROM_HYDRA:
        assert BASE[group][name] == "${oc.env:ZINFER_PARENT_RUN_ID,null}"
        assert defaults_of(GROUPS[group])[name] is None
        return
    if name not in BASE.get(group, {}):  # every choice of the group sets it
        folder = CONF / group
        choices = [yaml.safe_load(path.read_text()) for path in folder.glob("*.yaml")]
        assert choices and all(name in choice or "defaults" in choice for choice in choices), (
            f"{group}.{name} has a default in the dataclass that the YAML does not show"
        )
        return
    default = defaults_of(GROUPS[group])[name]
    assert BASE[group][name] == (list(default) if isinstance(default, tuple) else default)


def test_the_yaml_sets_nothing_that_the_dataclasses_do_not_know() -> None:
    known = {f"{group}.{item.name}" for group, kind in GROUPS.items() for item in fields(kind)}
    shown = {f"{group}.{name}" for group in GROUPS for name in BASE.get(group) or {}}
    assert shown <= known
