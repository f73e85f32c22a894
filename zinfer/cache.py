"""Where zinfer keeps what outlives a checkout: compiled ops, the demo model."""

from __future__ import annotations

import os
from pathlib import Path


def cache_dir() -> Path:
    """$ZINFER_CACHE, or zinfer/ under $XDG_CACHE_HOME, or under ~/.cache. Not created here."""
    if chosen := os.environ.get("ZINFER_CACHE"):
        return Path(chosen).expanduser().absolute()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache").absolute() / "zinfer"
