"""Keep packed weights in the cache folder, so that they are searched once.

A folder for each checkpoint, scheme and version: packed.safetensors holds the bytes of each weight,
made.json their checksums. The folder gets its name when both are whole, so a half-written one is
never met. A checksum is compared when its weight is read; a weight that fails it is made again.
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
from safetensors import SafetensorError, safe_open

from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.paths import cache_dir
from zinfer.units import format_bytes

WEIGHTS, MADE = "packed.safetensors", "made.json"
VERSION = 1
"""Changes when the search makes other codes of the same weights."""
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
    checksums: Mapping[str, str]
    """Name of the parameter -> SHA-256 of its bytes."""

    def __contains__(self, name: object) -> bool:
        """Tell if this parameter is kept packed."""
        return name in self.checksums

    def read(self, name: str) -> torch.Tensor | None:
        """Read a parameter's bytes, uint8 of one dimension. None: they are damaged."""
        try:
            with safe_open(self.folder / WEIGHTS, "pt") as file:
                found: torch.Tensor = file.get_tensor(name).clone()  # the file is mapped
        except (OSError, SafetensorError):
            return None
        return found if _sha256(found) == self.checksums[name] else None


def kept_weights(
    key: Mapping[str, object], sizes: Mapping[str, int], make: Make, events: EventLog
) -> Kept:
    """Find the packed weights of this key, or make them. Processes that ask together make one.

    Args:
        key: everything that the bytes depend on.
        sizes: parameter name -> bytes of the packed weight.

    Raises:
        ConfigError: the cache folder is full, or cannot be written.
    """
    everything = {**key, "version": VERSION}
    name = hashlib.sha256(json.dumps(everything, sort_keys=True).encode()).hexdigest()[:32]
    folder = cache_dir() / "quantised" / name
    with _spoken(folder, sum(sizes.values())), _only_one(folder, events):
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
        with safe_open(folder / WEIGHTS, "pt") as file:
            held = {name: file.get_slice(name).get_shape()[0] for name in file.keys()}  # noqa: SIM118
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        said = " ".join(str(error).split())
        events.warning(f"{folder} is damaged ({said}). The packed weights are made again")
    else:
        if held == sizes and set(checksums) == set(sizes):
            return Kept(folder=folder, checksums=checksums)
        events.warning(f"{folder} lacks some weights. The packed weights are made again")
    shutil.rmtree(folder)
    return None


def _made(folder: Path, key: Mapping[str, object], sizes: Mapping[str, int], make: Make) -> Kept:
    """Make the weights, and write each as it comes."""
    checksums: dict[str, str] = {}
    started_s = time.perf_counter()
    with _unfinished(folder) as made:
        with open(made / WEIGHTS, "wb") as file:
            begin, offsets = _write_header(file, sizes)

            def take(name: str, values: torch.Tensor) -> None:
                assert values.numel() == sizes[name], (name, values.numel(), sizes[name])
                file.seek(begin + offsets[name])
                file.write(memoryview(values.contiguous().numpy()))
                checksums[name] = _sha256(values)

            make(take)
            assert set(checksums) == set(sizes), sorted(set(sizes) - set(checksums))[:3]
        document = {
            "key": dict(key),
            "seconds": time.perf_counter() - started_s,
            "sha256": checksums,
        }
        (made / MADE).write_text(json.dumps(document, indent=1) + "\n")
        made.rename(folder)
    return Kept(folder=folder, checksums=checksums)


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
def _only_one(folder: Path, events: EventLog) -> Iterator[None]:
    """Wait until no other process makes the same folder, and keep others out meanwhile."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with open(folder.with_name(f"{folder.name}.lock"), "w") as lock:
        said_s = -math.inf
        while not _locked(lock):
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
        ConfigError: no space, or no permission.
    """
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            raise ConfigError([_no_space(folder.parent, size)]) from error
        if isinstance(error, PermissionError) or error.errno == errno.EROFS:
            raise ConfigError(
                [
                    f"dtype.rounding=searched keeps its weights in {folder.parent}, which cannot "
                    f"be written ({error.strerror}). Set the environment variable ZINFER_CACHE to "
                    "a folder of yours, or dtype.rounding=nearest"
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


def _sha256(values: torch.Tensor) -> str:
    return hashlib.sha256(memoryview(values.contiguous().numpy())).hexdigest()
