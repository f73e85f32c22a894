"""Keep packed weights in the cache folder, so that they are searched once.

A folder for each checkpoint, scheme and version: packed.safetensors holds the bytes of each weight,
made.json their checksums. The folder gets its name when both are whole, so a half-written one is
never met. A weight has checksums of its pieces. They are compared when pieces are read; a weight
that fails one is made again. So a rank reads and checks only what it holds.
"""

from __future__ import annotations

import errno
import fcntl
import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import read_header, read_into
from zinfer.paths import cache_dir
from zinfer.units import format_bytes

WEIGHTS, MADE = "packed.safetensors", "made.json"
VERSION = 3
"""Changes when the search makes other codes of the same weights, or files another form."""
PIECES = 64
"""A weight has so many checksums, each of as many bytes: any number of ranks shares them well."""
WAIT_S, SAY_S = 1.0, 60.0
"""Between two looks whether another process has finished, and between two words about it."""
FULL = (errno.ENOSPC, errno.EDQUOT)

Take = Callable[[str, torch.Tensor], None]
Make = Callable[[Take], None]
"""Hands the packed bytes of every weight to the function that it is given."""


@dataclass(frozen=True, kw_only=True)
class Kept:
    """Packed weights on disk; each is read when it is asked for."""

    folder: Path
    checksums: Mapping[str, list[str]]
    """Name of the parameter -> SHA-256 of each piece of its bytes."""
    begins: Mapping[str, int]
    """Name of the parameter -> where its bytes begin in the file."""
    sizes: Mapping[str, int]

    def fingerprint(self) -> str:
        """Hash all checksums: equal ones mean equal weights."""
        return hashlib.sha256(json.dumps(dict(self.checksums), sort_keys=True).encode()).hexdigest()

    def __contains__(self, name: object) -> bool:
        """Tell if this parameter is kept packed."""
        return name in self.checksums

    def read(self, name: str, begin: int = 0, end: int | None = None) -> torch.Tensor | None:
        """Read bytes of a parameter, uint8 of one dimension. None: they are damaged.

        Args:
            begin, end: of the wanted bytes; no end means all. Whole pieces are read around them.
        """
        size = self.sizes[name]
        end = size if end is None else end
        each = piece_bytes(size)
        first, last = begin // each, -(-end // each)
        start = first * each
        held = torch.empty(max(0, min(size, last * each) - start), dtype=torch.uint8)
        target = memoryview(held.numpy())
        try:
            done = read_into(target, self.folder / WEIGHTS, self.begins[name] + start)
        except OSError:
            return None
        if done < len(held) or _checksums(held, each) != self.checksums[name][first:last]:
            return None
        return held[begin - start : end - start]


def kept_weights(
    key: Mapping[str, object],
    sizes: Mapping[str, int],
    make: Make,
    events: EventLog,
    *,
    waiting: Callable[[], object] = lambda: None,
) -> Kept:
    """Find the packed weights of this key, or make them. Processes that ask together make one.

    Args:
        key: everything that the bytes depend on.
        sizes: parameter name -> bytes of the packed weight.
        waiting: called when another process makes them just now.

    Raises:
        ConfigError: the cache folder is full, or cannot be written.
    """
    everything = {**key, "version": VERSION}
    name = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "quantised" / name
    with _spoken(folder, sum(sizes.values())), _only_one(folder, events, waiting):
        found = _whole(folder, sizes, events)
        if found is None:
            _require_space(folder.parent, sum(sizes.values()))
            found = _made(folder, everything, sizes, make)
    return found


def remove(kept: Kept, events: EventLog, name: str) -> None:
    """Remove a folder that holds a damaged weight, and say so."""
    events.warning(
        f"{kept.folder / WEIGHTS} is damaged: {name} is not what was written. It is made again"
    )
    shutil.rmtree(kept.folder, ignore_errors=True)


def _whole(folder: Path, sizes: Mapping[str, int], events: EventLog) -> Kept | None:
    """Return what is kept; None where nothing is, or its files are not those that were written."""
    if not folder.is_dir():
        return None
    try:
        checksums = json.loads((folder / MADE).read_text())["sha256"]
        header, raw = read_header(folder / WEIGHTS)
        held = {name: row["shape"][0] for name, row in header.items()}
        begins = {name: 8 + len(raw) + row["data_offsets"][0] for name, row in header.items()}
        counts = {name: len(each) for name, each in checksums.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        said = " ".join(str(error).split()).removesuffix(". Download it again")
        events.warning(f"{folder} is damaged ({said}). The packed weights are made again")
    else:
        if held == sizes and counts == {name: _pieces(size) for name, size in sizes.items()}:
            return Kept(folder=folder, checksums=checksums, begins=begins, sizes=sizes)
        events.warning(f"{folder} lacks some weights. The packed weights are made again")
    shutil.rmtree(folder)
    return None


def _made(folder: Path, key: Mapping[str, object], sizes: Mapping[str, int], make: Make) -> Kept:
    """Make the weights, and write each as it comes."""
    checksums: dict[str, list[str]] = {}
    started_s = time.perf_counter()
    with _unfinished(folder) as made:
        with open(made / WEIGHTS, "wb") as file:
            begin, offsets = _write_header(file, sizes)

            def take(name: str, values: torch.Tensor) -> None:
                assert values.numel() == sizes[name], (name, values.numel(), sizes[name])
                file.seek(begin + offsets[name])
                file.write(memoryview(values.contiguous().numpy()))
                checksums[name] = _checksums(values, piece_bytes(sizes[name]))

            make(take)
            assert set(checksums) == set(sizes), sorted(set(sizes) - set(checksums))[:3]
        document = {
            "key": dict(key),
            "seconds": time.perf_counter() - started_s,
            "sha256": checksums,
        }
        (made / MADE).write_text(json.dumps(document, indent=1) + "\n")
        made.rename(folder)
    begins = {name: begin + offset for name, offset in offsets.items()}
    return Kept(folder=folder, checksums=checksums, begins=begins, sizes=sizes)


@contextmanager
def _unfinished(folder: Path) -> Iterator[Path]:
    """Give the folder in which another one is made, empty, and remove it if that fails.

    Call it under the lock: what lies there was left by a process that was killed.
    """
    made = folder.with_name(f".{folder.name}")
    shutil.rmtree(made, ignore_errors=True)
    made.mkdir()
    try:
        yield made
    finally:
        shutil.rmtree(made, ignore_errors=True)


def _write_header(file: Any, sizes: Mapping[str, int]) -> tuple[int, dict[str, int]]:
    """Write the header of a safetensors file; return its length and each weight's offset.

    Source: github.com/huggingface/safetensors, format.
    """
    offsets, end = {}, 0
    header: dict[str, object] = {}
    for name, size in sizes.items():
        offsets[name] = end
        header[name] = {"dtype": "U8", "shape": [size], "data_offsets": [end, end + size]}
        end += size
    raw = json.dumps(header).encode()
    raw += b" " * (-len(raw) % 8)
    file.write(len(raw).to_bytes(8, "little") + raw)
    return 8 + len(raw), offsets


@contextmanager
def _only_one(folder: Path, events: EventLog, waiting: Callable[[], object]) -> Iterator[None]:
    """Wait until no other process makes the same folder, and keep others out meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        said_s = -math.inf
        while not _locked(lock):
            waiting()
            if time.monotonic() - said_s >= SAY_S:  # the watchdog takes silence for a stall
                events.phase("wait for another process that rounds these weights")
                said_s = time.monotonic()
            time.sleep(WAIT_S)
        yield


def _locked(lock: Any) -> bool:
    """Take the lock unless another process has it."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


@contextmanager
def _spoken(folder: Path, size: int) -> Iterator[None]:
    """Turn what a file system refuses into a sentence.

    Raises:
        ConfigError: no space, no permission, or a file where a folder should be.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ConfigError([_no_space(folder.parent, size)]) from error
        named = Path(str(error.filename or ""))
        here = named.is_relative_to(cache_dir())
        if here or isinstance(error, PermissionError) or error.errno == errno.EROFS:
            which = f"{named}: " if here and named != folder.parent else ""
            raise ConfigError(
                [
                    f"dtype.rounding=searched keeps its weights in {folder.parent}, which cannot "
                    f"be written ({which}{error.strerror}). Set the environment variable "
                    "ZINFER_CACHE to a folder of yours, or dtype.rounding=nearest"
                ]
            ) from error
        raise


def _require_space(folder: Path, size: int) -> None:
    """Raise ConfigError before the search where its result has no room."""
    if _free(folder) < size:
        raise ConfigError([_no_space(folder, size)])


def _no_space(folder: Path, size: int) -> str:
    return (
        f"dtype.rounding=searched keeps {format_bytes(size)} in {folder}, which has "
        f"{format_bytes(_free(folder))} left. Set the environment variable ZINFER_CACHE to a "
        "folder on another disk, or dtype.rounding=nearest"
    )


def _free(folder: Path) -> int:
    return shutil.disk_usage(folder).free


def piece_bytes(size: int) -> int:
    """Return the bytes of a piece of a weight; its last piece may be shorter."""
    return max(1, -(-size // PIECES))


def _pieces(size: int) -> int:
    return -(-size // piece_bytes(size))


def _checksums(values: torch.Tensor, each: int) -> list[str]:
    """Hash so many bytes after the other."""
    pieces = values.contiguous().split(each) if len(values) else ()
    return [hashlib.sha256(memoryview(piece.numpy())).hexdigest() for piece in pieces]
