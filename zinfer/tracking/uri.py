"""Say where runs are stored: the URI of the store, and the paths inside it."""

from __future__ import annotations

import contextlib
import importlib.metadata
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from pathlib import Path
from urllib.parse import unquote

from zinfer.config import TrackingConfig
from zinfer.redact import redact

DATABASE_FILE = "mlflow.db"
ARTIFACTS_FOLDER = "mlartifacts"
SQLITE = "sqlite:///"
URI_VARIABLE = "MLFLOW_TRACKING_URI"


def resolved_tracking(tracking: TrackingConfig, say: Callable[[str], None]) -> TrackingConfig:
    """Decide tracking=auto: the store of MLFLOW_TRACKING_URI, which is said, else a sqlite file."""
    if tracking.store != "auto":
        return tracking
    given = os.environ.get(URI_VARIABLE, "").strip()
    if tracking.uri or not given:
        return replace(tracking, store="sqlite")
    say(f"{URI_VARIABLE} is set: runs are logged to {redact(given)} (else: tracking=sqlite)")
    return replace(tracking, store="sqlite" if sqlite_path(given) else "server", uri=given)


def tracking_uri(tracking: TrackingConfig, cwd: Path) -> str:
    """Return the store's absolute URI: the one given, else a sqlite file in `cwd`."""
    tracking = resolved_tracking(tracking, lambda _: None)
    if tracking.uri is None:
        return sqlite_uri(cwd / DATABASE_FILE)
    path = sqlite_path(tracking.uri)
    if path is None:
        return tracking.uri
    _, mark, query = tracking.uri.partition("?")
    return sqlite_uri(cwd / path.expanduser()) + mark + query


def sqlite_uri(path: Path) -> str:
    """Return the URI of a sqlite file, with what URIs give another meaning in its path quoted."""
    text = str(path)
    if _unquotes_paths():
        for mark in "%?#":  # the percent sign first
            text = text.replace(mark, f"%{ord(mark):02X}")
    return SQLITE + text


def sqlite_path(uri: str) -> Path | None:
    """Return the database file of a sqlite URI, None for other stores.

    sqlite:///relative/path, sqlite:////absolute/path.
    """
    if not uri.startswith(SQLITE):
        return None
    text = uri.removeprefix(SQLITE).partition("?")[0]
    return Path(unquote(text) if _unquotes_paths() else text)


@cache
def _unquotes_paths() -> bool:
    """Say whether SQLAlchemy reads %3F in a database's path as `?`: from 2.1 on it does."""
    try:
        major, minor = importlib.metadata.version("sqlalchemy").split(".")[:2]
    except importlib.metadata.PackageNotFoundError:
        return True
    return (int(major), int(minor)) >= (2, 1)


def artifact_location(uri: str, cwd: Path) -> str | None:
    """Return where a new experiment keeps its artifacts, as a URI.

    Beside a sqlite file, in `cwd` for another database. A server (None) decides itself.
    """
    path = sqlite_path(uri)
    if path is not None:
        return (path.absolute().parent / ARTIFACTS_FOLDER).as_uri()
    return None if is_server(uri) else (cwd / ARTIFACTS_FOLDER).as_uri()


def is_server(uri: str) -> bool:
    """Say whether the store is an MLflow server."""
    return uri.startswith(("http://", "https://"))


@contextlib.contextmanager
def no_stray_folder(uri: str) -> Iterator[None]:
    """Remove the empty folder that MLflow makes for the quoted spelling of a sqlite file's path."""
    path = sqlite_path(uri)
    stray = Path(uri.removeprefix(SQLITE).partition("?")[0]).parent
    there = stray.exists()
    yield
    if path is not None and not there and stray != path.parent:
        with contextlib.suppress(OSError):
            os.removedirs(stray)
