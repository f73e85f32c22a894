"""Find zinfer's folders: the cache that outlives a checkout, and the configuration files."""

from __future__ import annotations

import os
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
HOMES = (PACKAGE, PACKAGE.parent)
"""Where files lie that are not code: inside the wheel's package, or beside it in a checkout."""


def cache_dir() -> Path:
    """Return $ZINFER_CACHE, or zinfer/ under $XDG_CACHE_HOME, or under ~/.cache.

    The folder is not created here.
    """
    if chosen := os.environ.get("ZINFER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "zinfer"


def conf_dir() -> str:
    """Find conf/: inside the installed package, or beside it in a checkout.

    Raises:
        FileNotFoundError: it is in neither place.
    """
    for folder in HOMES:
        if (folder / "conf" / "config.yaml").is_file():
            return str(folder / "conf")
    raise FileNotFoundError("conf/config.yaml is neither inside the zinfer package nor beside it")


def given_file(name: str) -> Path:
    """Find a file that a user or a preset names: as it stands, else among those of zinfer itself.

    So a preset may name `examples/prompts.txt` in whatever folder it runs.
    """
    given = Path(name).expanduser()
    brought = (folder / given for folder in HOMES if not given.is_absolute())
    return next((path for path in (given, *brought) if path.is_file()), given)
