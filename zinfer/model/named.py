"""Find a model by the name that a person gives: of the catalogue, a local folder, or a hub id."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Any

from zinfer.config import ModelConfig
from zinfer.model.hub import folder_of
from zinfer.paths import conf_dir

CUSTOM = "custom"
"""The catalogue's file for a model of one's own: it has no architecture, only a source."""


def named_model(name: str) -> ModelConfig:
    """Return the catalogue's entry of this name, else model=custom with this name as its source.

    A name without a slash that is neither in the catalogue nor a folder is refused as a typo: hub
    ids have an owner and a slash.

    Raises:
        ValueError: the catalogue has no such model.
    """
    names = catalogue_names()
    if name in names:
        return ModelConfig(**_catalogue_entry(name))
    if folder_of(name) is not None or "/" in name or name.startswith("~"):
        return ModelConfig(name=CUSTOM, source=name)
    close = difflib.get_close_matches(name, names, n=3)
    hint = f"Did you mean {' or '.join(close)}?" if close else f"It has {', '.join(names)}."
    raise ValueError(
        f"the catalogue has no model {name}. {hint} Or give a folder or a hub id (owner/name)"
    )


def catalogue_names() -> list[str]:
    """Return the names of the catalogue's models, sorted."""
    files = (Path(conf_dir()) / "model").glob("*.yaml")
    return sorted(path.stem for path in files if path.stem != CUSTOM)


def _catalogue_entry(name: str) -> dict[str, Any]:
    """Read conf/model/NAME.yaml, its defaults list applied as Hydra does."""
    import yaml

    tree: dict[str, Any] = yaml.safe_load((Path(conf_dir()) / "model" / f"{name}.yaml").read_text())
    for base_name in tree.pop("defaults", []):
        if base_name != "_self_":
            base = _catalogue_entry(base_name)
            tree = {**base, **tree, "overrides": {**base["overrides"], **tree["overrides"]}}
    return tree
