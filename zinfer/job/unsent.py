"""Remember which job folders hold a run that its store has not got, wherever they are.

A fixed hydra.run.dir or hydra.sweep.dir may be anywhere, so the cache has a note of each. The
folders of the defaults, outputs/ and multirun/, are also searched: notes of another machine, or of
a cache that was emptied, are not needed for those.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from zinfer.job.files import EARLIER_FOLDER, NOT_LOGGED_FILE
from zinfer.job.records import UnsentNote, read_record, write_json
from zinfer.paths import cache_dir

ROOTS = ("outputs", "multirun")
"""Where jobs are, unless hydra.run.dir or hydra.sweep.dir say otherwise."""


@dataclass(frozen=True)
class Unsent:
    """Runs that wait for their store."""

    folders: tuple[Path, ...]
    """Job folders of this working directory, in their order."""
    looked_in: tuple[str, ...]
    """The places where they were looked for, in words."""
    elsewhere: tuple[str, ...]
    """Other working directories that have such runs."""


def note_unsent(folder: Path) -> None:
    """Note that this folder holds a run that is to be sent later from this working directory."""
    note = UnsentNote(
        folder=str(folder.resolve()), working_directory=str(Path.cwd()), host=socket.gethostname()
    )
    with contextlib.suppress(OSError):  # without a cache only outputs/ and multirun/ are found
        path = _note_of(folder)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_json(path, vars(note), private=True)


def unsent() -> Unsent:
    """Find the runs that wait. Notes whose runs are sent, or whose folders are gone, are removed.

    Folders on a disk of another host that cannot be seen from here are left noted.
    """
    here, elsewhere, noted = str(Path.cwd()), set(), []
    for path in sorted((cache_dir() / "unsent").glob("*.json")):
        note = read_record(path, UnsentNote)
        if note is None:
            continue
        folders = [found for found in folders_since(Path(note.folder)) if _waits(found)]
        if not folders and (note.host == socket.gethostname() or Path(note.folder).exists()):
            path.unlink(missing_ok=True)
        elif note.working_directory == here:
            noted += folders
        elif folders:
            elsewhere.add(note.working_directory)
    below = [folder.resolve() for root in ROOTS for folder in _waiting_below(Path(root))]
    outside = sorted(set(noted) - set(below))
    places = [f"{root}/" for root in ROOTS] + [str(folder) for folder in outside]
    return Unsent(tuple(sorted(below) + outside), tuple(places), tuple(sorted(elsewhere)))


def folders_since(job_dir: Path) -> Iterator[Path]:
    """Yield where the files of a job may be now.

    They are in its folder, or in earlier/N of it, or of a folder that it was in.
    """
    yield job_dir
    for above in (job_dir, *job_dir.parents):
        for attempt in above.glob(f"{EARLIER_FOLDER}/[0-9]*"):
            yield attempt / job_dir.relative_to(above)


def _waits(folder: Path) -> bool:
    return (folder / NOT_LOGGED_FILE).is_file()


def _waiting_below(root: Path) -> list[Path]:
    return [Path(folder) for folder, _, files in os.walk(root) if NOT_LOGGED_FILE in files]


def _note_of(folder: Path) -> Path:
    token = hashlib.sha256(os.fsencode(folder.resolve())).hexdigest()[:16]
    return cache_dir() / "unsent" / f"{token}.json"
