"""Make a store that is there before MLflow asks for it.

MLflow builds a new sqlite store by 67 migrations: 7 s, and six processes that start at once crash
each other. store.sql is what those migrations make of an empty file (a test compares them), written
in one transaction under a lock: 40 ms. Where the installed MLflow has other migrations, they run as
MLflow runs them, under the same lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import shlex
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urlsplit

from zinfer.redact import redact
from zinfer.tracking.uri import (
    DATABASE_FILE,
    SQLITE,
    artifact_location,
    is_server,
    sqlite_path,
    sqlite_uri,
)

SCHEMA_FILE = Path(__file__).with_name("store.sql")
SERVER_TIMEOUT_S = 5.0
BUSY_TIMEOUT_S = 60.0


class TrackingUnavailable(Exception):
    """Runs cannot be logged or read. The message is for the user, without credentials.

    Args:
        problem: one sentence without its full stop.
        remedy: what helps whichever command met the problem, or None.
        other_store: URI of a store that could be used instead, or None.
        settings: other overrides that avoid the problem.
    """

    def __init__(
        self,
        problem: str,
        *,
        remedy: str | None = None,
        other_store: str | None = None,
        settings: tuple[str, ...] = (),
    ) -> None:
        overrides = ((f"tracking.uri={other_store}",) if other_store else ()) + settings
        super().__init__(advised(problem, remedy, overrides))
        self.problem, self.remedy, self.other_store = problem, remedy, other_store


def advised(problem: str, remedy: str | None, settings: tuple[str, ...]) -> str:
    """Join a problem and its remedies: 'PROBLEM. REMEDY, or set A or B'."""
    setting = " or ".join(settings)
    if remedy and setting:
        return f"{problem}. {remedy}, or set {setting}"
    advice = remedy or (f"Set {setting}" if setting else None)
    return problem if advice is None else f"{problem}. {advice}"


def ensure_store(uri: str) -> None:
    """Make the sqlite store if there is none; see that a server answers. MLflow is not imported.

    Any number of processes may do it at once.

    Raises:
        TrackingUnavailable: with what to set.
    """
    path = sqlite_path(uri)
    if path is not None:
        _ensure_sqlite(path)
    elif is_server(uri):
        _ensure_server(uri)


def _ensure_sqlite(path: Path) -> None:
    try:
        if database_revision(path) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with creation_lock(path.with_name(path.name + ".lock")):
                if database_revision(path) is None:
                    create_database(path)
        found = database_revision(path)
        if found == installed_revision():
            ensure_default_experiment(path)
    except (OSError, sqlite3.Error) as error:
        raise TrackingUnavailable(
            f"{path}: {error}",
            other_store="sqlite:////path/to/mlflow.db",
            settings=("tracking=none",),
        ) from error
    wanted = installed_revision()
    if found != wanted:
        raise TrackingUnavailable(
            f"{path} has the schema of another MLflow version ({found}, the installed one wants "
            f"{wanted})",
            remedy=f"Copy the file, then run mlflow db upgrade {shlex.quote(sqlite_uri(path))}",
            other_store=sqlite_uri(path.with_name(f"{path.stem}-2.db")),
        )


def create_database(path: Path) -> None:
    """Make an empty store in a file that is missing or has no tables."""
    script = SCHEMA_FILE.read_text()
    if installed_revision() != schema_file_revision(script):
        _migrate(path)
        return
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.executescript(script)


def ensure_default_experiment(path: Path) -> None:
    """Add MLflow's experiment 0, `Default`, where it lacks; MLflow asks for it at each connection.

    MLflow writes the name of the working directory into its own statement, which ends in a syntax
    error where the name has both kinds of quotes.
    """
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        if connection.execute("SELECT 1 FROM experiments WHERE experiment_id = 0").fetchone():
            return
        now_ms = int(time.time() * 1000)
        values = {
            "experiment_id": 0,
            "name": "Default",
            "artifact_location": artifact_location(sqlite_uri(path), path.parent),
            "lifecycle_stage": "active",
            "creation_time": now_ms,
            "last_update_time": now_ms,
            "workspace": "default",
        }
        columns = {row[1] for row in connection.execute("PRAGMA table_info(experiments)")}
        known = {name: value for name, value in values.items() if name in columns}
        marks = ", ".join("?" * len(known))
        with connection:  # another process may have added it by now
            connection.execute(
                f"INSERT OR IGNORE INTO experiments ({', '.join(known)}) VALUES ({marks})",
                list(known.values()),
            )


def _migrate(path: Path) -> None:
    """Run MLflow's own migrations on a file beside `path`, which takes its place afterwards."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        fresh = Path(folder) / path.name
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "db", "upgrade", sqlite_uri(fresh)],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"},
            capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            said = done.stderr.strip().splitlines() or ["no message"]
            raise OSError(f"mlflow db upgrade failed with exit code {done.returncode}: {said[-1]}")
        os.replace(fresh, path)


def database_revision(path: Path) -> str | None:
    """Return the schema revision in a sqlite file; None without MLflow's tables, or a file.

    Raises:
        sqlite3.Error: not a database, or one that cannot be read.
    """
    if not path.exists():
        return None
    with contextlib.closing(
        sqlite3.connect(f"file:{quote(str(path))}?mode=rw", uri=True, timeout=BUSY_TIMEOUT_S)
    ) as connection:
        if (
            connection.execute(
                "SELECT 1 FROM sqlite_master WHERE name = 'alembic_version'"
            ).fetchone()
            is None
        ):
            return None
        row = connection.execute("SELECT version_num FROM alembic_version").fetchone()
        return None if row is None else str(row[0])


@cache
def installed_revision() -> str | None:
    """Return the newest schema revision of the installed MLflow. Read, not imported.

    It is the migration that no other names as the one before it.
    """
    spec = importlib.util.find_spec("mlflow")
    if spec is None or not spec.submodule_search_locations:
        raise TrackingUnavailable(
            "MLflow is not installed", remedy="Run pip install mlflow", settings=("tracking=none",)
        )
    folder = (
        Path(next(iter(spec.submodule_search_locations))) / "store" / "db_migrations" / "versions"
    )
    sources = [path.read_text() for path in folder.glob("*.py")]
    revisions = {
        found[1]
        for source in sources
        if (found := re.search(r"^revision = ['\"](\w+)", source, re.MULTILINE))
    }
    before = " ".join(
        line
        for source in sources
        for line in re.findall(r"^down_revision = (.+)$", source, re.MULTILINE)
    )
    newest = revisions - set(re.findall(r"\w+", before))
    return newest.pop() if len(newest) == 1 else None


def schema_file_revision(script: str) -> str | None:
    """Return the revision that store.sql makes."""
    found = re.search(r"INSERT INTO \"alembic_version\" VALUES\('(\w+)'\)", script)
    return found[1] if found else None


@contextlib.contextmanager
def creation_lock(path: Path) -> Iterator[None]:
    """Let one process in at a time.

    The file is removed afterwards: who still waits for it finds the store made.
    """
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def first_connection_lock(uri: str) -> Iterator[None]:
    """Let one process of this machine at a time make the tables of a database server.

    MLflow makes them on its first connection (postgresql://...).
    """
    if uri.startswith(SQLITE) or is_server(uri):
        yield
        return
    with creation_lock(
        Path(tempfile.gettempdir()) / f"zinfer-store-{sha256(uri.encode()).hexdigest()[:16]}.lock"
    ):
        yield


def _ensure_server(uri: str) -> None:
    """Say at once that a server does not answer; MLflow would retry for minutes."""
    try:
        parts = urlsplit(uri)
        without_user = parts._replace(
            netloc=parts.netloc.rpartition("@")[2], path=parts.path.rstrip("/") + "/health"
        )
        urllib.request.urlopen(without_user.geturl(), timeout=SERVER_TIMEOUT_S).close()
    except urllib.error.HTTPError:
        return  # it answers; whether it lets us in shows later
    except (OSError, ValueError) as error:
        if "CERTIFICATE" in str(error):
            return  # MLflow has settings of its own for certificates
        reason = getattr(error, "reason", error)
        raise TrackingUnavailable(
            f"the MLflow server {redact(uri)} does not answer ({redact(str(reason))})",
            remedy="Start it",
            settings=("tracking=sqlite", "tracking=none"),
        ) from None


def migrated_schema(path: Path) -> str:
    """Return the text of store.sql, from MLflow's own migrations of a new file at `path`."""
    _migrate(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        statements = "\n".join(connection.iterdump()).replace(
            "BEGIN TRANSACTION;", "BEGIN EXCLUSIVE;", 1
        )
    statements = "\n".join(line.rstrip() for line in statements.splitlines())
    version = importlib.metadata.version("mlflow")
    return (
        f"-- An empty MLflow store, as the migrations of MLflow {version} "
        "(Apache-2.0, github.com/mlflow/mlflow) make it on sqlite.\n"
        "-- Made by `python -m zinfer.tracking.store > zinfer/tracking/store.sql`; "
        f"not edited by hand.\n{statements}\n"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made_in:
        sys.stdout.write(migrated_schema(Path(made_in) / DATABASE_FILE))
