"""Find zinfer's folders: the cache that outlives a checkout, and the configuration files."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$ZINFER_CACHE, or zinfer/ under $XDG_CACHE_HOME, or under ~/.cache. Not created here."""
    if chosen := os.environ.get("ZINFER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "zinfer"


def conf_dir() -> str:
    """conf/ inside the installed package, or beside it in a checkout."""
    package = Path(__file__).resolve().parent
    for folder in (package / "conf", package.parent / "conf"):
        if (folder / "config.yaml").is_file():
            return str(folder)
    raise FileNotFoundError("conf/config.yaml is neither inside the zinfer package nor beside it")
