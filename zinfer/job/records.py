"""Read back what other processes left in a file, and believe only what has the right form.

A record that is missing, cut short, or not what it should be is None. Nothing in it is used as a
path to delete.
"""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

from pydantic import ConfigDict, TypeAdapter, ValidationError
from pydantic.dataclasses import dataclass

from zinfer.job.outcome import EndedBy, Json, Status
from zinfer.redact import redact

STRICT = ConfigDict(extra="ignore", strict=True, defer_build=True)
FolderKind = Literal["job", "sweep"]
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class JobRecord:
    """job.json: what the driver hands to its worker."""

    attempt: str
    """Random id of this use of the folder. A record of another attempt is not this job's."""
    driver_pid: int
    driver_start_ticks: int | None
    working_directory: str
    config: dict[str, Any]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class WorkerRecord:
    """One entry of workers.json: a rank's process on this host."""

    pid: int
    start_ticks: int | None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class FolderNote:
    """A note in the cache: on this machine a driver works, or worked, on this folder."""

    folder: str
    kind: FolderKind
    host: str
    boot: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class UnsentNote:
    """A note in the cache: this folder holds a run that its store has not got."""

    folder: str
    working_directory: str
    host: str


@dataclass(frozen=True, kw_only=True, config=STRICT)
class NotLogged:
    """not_logged.json: why a run is not in its store, and which run was opened there."""

    problem: str
    run_id: str | None


def write_json(path: Path, value: Any, *, private: bool = False) -> None:
    """Write the whole document or nothing: nobody ever finds half of one.

    Args:
        private: keep its secrets, which another process needs; only the owner may read it.

    Raises:
        OSError: it cannot be written.
    """
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.touch(mode=0o600 if private else 0o666)
        temporary.write_text(json.dumps(value if private else redact(value), indent=1))
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise


def read_json(path: Path) -> Any:
    """Return the document, or None where there is none or it was cut short."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def read_record(path: Path, kind: type[T]) -> T | None:
    """Return the file's content as `kind`, or None where it is not one."""
    try:
        record: T = TypeAdapter(kind).validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return record


def read_result(path: Path) -> Json | None:
    """Return a result.json or reused.json whose status, reason and metrics have the right types."""
    found = read_json(path)
    return found if is_result(found) else None


def is_result(found: Any) -> bool:
    """Check the fields of a result that others decide by."""
    if not isinstance(found, dict) or found.get("status") not in get_args(Status):
        return False
    metrics, ended_by = found.get("metrics", {}), found.get("ended_by", EndedBy.ITSELF)
    return (
        isinstance(metrics, dict)
        and all(isinstance(value, int | float) for value in metrics.values())
        and ended_by in list(EndedBy)
        and isinstance(found.get("reason"), str | None)
        and isinstance(found.get("run_id"), str | None)
        and isinstance(found.get("problems", []), list)
    )
