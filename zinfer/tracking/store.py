"""Where runs are stored, and a store that is there before MLflow asks for it.

MLflow builds a new sqlite store by 67 migrations: 7 s, and six processes that start at once crash each other. mlflow_store.sql is what
those migrations make of an empty file (tests/test_tracking.py compares them), written in one transaction under a lock: 40 ms. Where the
installed MLflow has other migrations, they run as MLflow runs them, under the same lock.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import importlib.util
import os
import re
import sqlite3
import subprocess
import sys
import tempfile
import urllib.error
import urllib.request
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from pathlib import Path
from urllib.parse import quote, urlsplit

from zinfer.config import TrackingConfig
from zinfer.redact import redact

SCHEMA_FILE = Path(__file__).with_name("store.sql")
DATABASE_FILE = "mlflow.db"
ARTIFACTS_FOLDER = "mlartifacts"
SQLITE = "sqlite:///"
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
    """'PROBLEM. REMEDY, or set A or B'."""
    setting = " or ".join(settings)
    if remedy and setting:
        return f"{problem}. {remedy}, or set {setting}"
    advice = remedy or (f"Set {setting}" if setting else None)
    return problem if advice is None else f"{problem}. {advice}"


def tracking_uri(tracking: TrackingConfig, cwd: Path) -> str:
    """The store's URI, absolute: the one given, else a sqlite file in `cwd`."""
    uri = tracking.uri or SQLITE + DATABASE_FILE
    path = sqlite_path(uri)
    return uri if path is None else SQLITE + str(cwd / path)


def sqlite_path(uri: str) -> Path | None:
    """The database file of a sqlite URI (sqlite:///relative, sqlite:////absolute); None for other stores."""
    return Path(uri.removeprefix(SQLITE)) if uri.startswith(SQLITE) else None


def artifact_location(uri: str, cwd: Path) -> str | None:
    """Where a new experiment keeps its artifacts: beside a sqlite file, in `cwd` for another database; a server (None) decides itself."""
    path = sqlite_path(uri)
    if path is not None:
        return str(path.parent / ARTIFACTS_FOLDER)
    return None if uri.startswith(("http://", "https://")) else str(cwd / ARTIFACTS_FOLDER)


def ensure_store(uri: str) -> None:
    """Make the sqlite store if there is none, see that a server answers. Without importing MLflow; any number of processes at once.

    Raises:
        TrackingUnavailable: with what to type.
    """
    path = sqlite_path(uri)
    if path is not None:
        _ensure_sqlite(path)
    elif uri.startswith(("http://", "https://")):
        _ensure_server(uri)


def _ensure_sqlite(path: Path) -> None:
    try:
        if database_revision(path) is None:
            path.parent.mkdir(parents=True, exist_ok=True)
            with creation_lock(path.with_name(path.name + ".lock")):
                if database_revision(path) is None:
                    create_database(path)
        found = database_revision(path)
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
            remedy=f"Copy the file, then run mlflow db upgrade {SQLITE}{path}",
            other_store=f"{SQLITE}{path.with_suffix('')}-2.db",
        )


def create_database(path: Path) -> None:
    """An empty store in a file that is missing or has no tables."""
    script = SCHEMA_FILE.read_text()
    if installed_revision() != schema_file_revision(script):
        _migrate(path)
        return
    with contextlib.closing(sqlite3.connect(path, timeout=BUSY_TIMEOUT_S)) as connection:
        connection.executescript(script)


def _migrate(path: Path) -> None:
    """MLflow's own migrations, on a file beside `path` that takes its place when they are done."""
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        fresh = Path(folder) / path.name
        done = subprocess.run(
            [sys.executable, "-m", "mlflow", "db", "upgrade", f"{SQLITE}{fresh}"],
            env={**os.environ, "MLFLOW_DISABLE_TELEMETRY": "true"}, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False,
        )  # fmt: skip
        if done.returncode != 0:
            said = done.stderr.strip().splitlines()
            raise OSError(
                f"mlflow db upgrade failed with exit code {done.returncode}: {said[-1] if said else 'no message'}"
            )
        os.replace(fresh, path)


def database_revision(path: Path) -> str | None:
    """The schema revision in a sqlite file; None where there is no file, or none of MLflow's tables in it.

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
    """The newest schema revision of the installed MLflow: the migration that no other names as the one before it. Read, not imported."""
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
    """The revision that mlflow_store.sql makes."""
    found = re.search(r"INSERT INTO \"alembic_version\" VALUES\('(\w+)'\)", script)
    return found[1] if found else None


@contextlib.contextmanager
def creation_lock(path: Path) -> Iterator[None]:
    """One process at a time. The file is removed afterwards: who still waits for it finds the store made."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        try:
            yield
        finally:
            path.unlink(missing_ok=True)


@contextlib.contextmanager
def first_connection_lock(uri: str) -> Iterator[None]:
    """MLflow builds the tables of a database server (postgresql://...) on its first connection: one process of this machine at a time."""
    if uri.startswith((SQLITE, "http://", "https://")):
        yield
        return
    with creation_lock(
        Path(tempfile.gettempdir()) / f"zinfer-store-{sha256(uri.encode()).hexdigest()[:16]}.lock"
    ):
        yield


def _ensure_server(uri: str) -> None:
    """A server that does not answer is said at once; MLflow would retry for minutes."""
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
    """The text of mlflow_store.sql, from MLflow's own migrations of a new file at `path`."""
    _migrate(path)
    with contextlib.closing(sqlite3.connect(path)) as connection:
        statements = "\n".join(connection.iterdump()).replace(
            "BEGIN TRANSACTION;", "BEGIN EXCLUSIVE;", 1
        )
    statements = "\n".join(line.rstrip() for line in statements.splitlines())
    version = importlib.metadata.version("mlflow")
    return (
        f"-- An empty MLflow store, as the migrations of MLflow {version} (Apache-2.0, github.com/mlflow/mlflow) make it on sqlite.\n"
        f"-- Made by `python -m zinfer.tracking.store > zinfer/mlflow_store.sql`; not edited by hand.\n{statements}\n"
    )


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as made_in:
        sys.stdout.write(migrated_schema(Path(made_in) / DATABASE_FILE))
