"""Read small system files: text, one number, the least of what is known."""

from __future__ import annotations

from pathlib import Path

ROOT = Path("/")


def read_text(path: Path) -> str:
    """Return the text of a small system file, empty where there is none."""
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def read_integer(path: Path) -> int | None:
    """Read a file of one number; None where it holds `max` or does not exist."""
    text = read_text(path).strip()
    return int(text) if text.isdecimal() else None


def least(*values: int | None) -> int | None:
    """Return the smallest of the known numbers."""
    return min((value for value in values if value is not None), default=None)
