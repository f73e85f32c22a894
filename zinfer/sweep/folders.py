"""Check and make the folders of a sweep: they are what Hydra's settings say, so anything."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from pathlib import Path

from zinfer.config import ConfigError

PROBLEMS_SHOWN = 3
ADVICE = "Set hydra.sweep.subdir='${hydra.job.num}'"


def require_folders(jobs: Iterable[tuple[int, Path]]) -> None:
    """Refuse folders that two jobs share, or that cannot be made.

    Args:
        jobs: number and folder of each.

    Raises:
        ConfigError: with what to set.
    """
    problems: list[str] = []
    seen: dict[Path, int] = {}
    for num, folder in jobs:
        other = seen.setdefault(folder, num)
        if other != num:
            problems.append(f"jobs {other} and {num} have one folder, {folder}. {ADVICE}")
        elif problem := unusable(folder):
            problems.append(f"the folder of job {num} cannot be made: {problem}. {ADVICE}")
    more = len(problems) - PROBLEMS_SHOWN
    if more > 0:
        problems[PROBLEMS_SHOWN:] = [f"{more} more jobs have such folders. {ADVICE}"]
    if problems:
        raise ConfigError(problems)


def unusable(folder: Path) -> str | None:
    """Return why this folder can be neither made nor used; None where it can."""
    there = next(path for path in (folder, *folder.parents) if _exists(path))
    if not there.is_dir():
        return f"{there} is not a folder"
    if not os.access(there, os.W_OK | os.X_OK):
        return f"{there} is not writable"
    longest = os.pathconf(there, "PC_NAME_MAX")
    for part in folder.relative_to(there).parts:
        length = len(os.fsencode(part))
        if length > longest:
            return f"the name {part[:40]}... has {length} bytes, and {longest} are allowed"
    return None


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # its name is too long to be asked for
        return False


def make_folders(*folders: Path) -> None:
    """Make the folders of a sweep and of its jobs.

    Raises:
        ConfigError: one cannot be made.
    """
    for folder in folders:
        with writable(folder):
            folder.mkdir(parents=True, exist_ok=True)


@contextlib.contextmanager
def writable(folder: Path) -> Iterator[None]:
    """Do something in the folder of a sweep.

    Raises:
        ConfigError: its disk is full, or it cannot be made or written to.
    """
    try:
        yield
    except OSError as error:
        raise ConfigError(
            [
                f"the folder {folder} cannot be made or written to: {error.strerror}. "
                "Set hydra.sweep.dir to a folder that you may write to"
            ]
        ) from error
