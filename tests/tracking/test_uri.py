"""The store is where it is said to be, whatever the folder is called."""

from __future__ import annotations

import os
import sqlite3
from contextlib import closing
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.config import TrackingConfig
from zinfer.job.outcome import Outcome
from zinfer.tracking.client import connect
from zinfer.tracking.run import open_run
from zinfer.tracking.store import TrackingUnavailable, create_database, ensure_default_experiment
from zinfer.tracking.uri import resolved_tracking, sqlite_path, sqlite_uri, tracking_uri

NAMES = (
    "plain", "a b", "it's", 'q"uote', "50%", "50%20off", "why?", "a?b=c", "c#1",
    "ünï 模", "new\nline", "a+b", "c:d", "[x]", "{y}", "$HOME",
    "a&b", "a;b", "-n", "back\\slash", "it's \"q\"", "a :b",
)  # fmt: skip
ENVIRONMENT = {
    "zinfer": {"version": "0.1.0", "commit": "0123abcd", "dirty": True},
    "cpu": {"model": "AMD EPYC 7763", "usable_cores": 64, "instruction_sets": ["avx512_bf16"]},
    "host_total_bytes": 540 * 2**30,
    "gpus": [],
}


@pytest.mark.parametrize("name", NAMES)
def test_a_sqlite_uri_leads_back_to_its_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name / "mlflow.db"
    assert sqlite_path(sqlite_uri(path)) == path
    assert sqlite_path(tracking_uri(TrackingConfig(store="sqlite"), tmp_path / name)) == path


def test_a_run_is_stored_with_its_files_in_a_folder_of_any_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in NAMES:
        folder = tmp_path / name
        (folder / "job").mkdir(parents=True)
        (folder / "job" / "events.jsonl").write_text("{}\n")
        monkeypatch.chdir(folder)
        config = composed("model=tiny-llama", "hardware.accelerator=cpu", "tracking=sqlite")
        run = open_run(config, job_dir=Path("job"), environment=ENVIRONMENT, attempt="0123")
        run.finish(Outcome(status="ok"))
        with sqlite3.connect(folder / "mlflow.db") as store:
            assert store.execute("SELECT status FROM runs").fetchall() == [("FINISHED",)], name
        assert list(folder.rglob("artifacts/events.jsonl")), name
    assert {path.name for path in tmp_path.iterdir()} == set(NAMES), "nothing beside them"


@pytest.mark.parametrize(
    ("name", "uri", "said"),
    [
        ("it's", "postgresql://me:geheim-wort@host/db", "Start in a directory without quotes"),
        ("it's", "http://127.0.0.1:9", "syntax error"),
        ("plain", "postgresql://host/db", "syntax error"),
    ],
)
def test_a_database_that_a_folders_name_breaks_is_explained(
    name: str, uri: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import mlflow

    def fail(tracking_uri: str) -> None:
        raise ValueError("syntax error")

    (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path / name)
    monkeypatch.setattr(mlflow, "MlflowClient", fail)
    with pytest.raises((TrackingUnavailable, ValueError), match=said) as raised:
        connect(uri)
    assert "geheim" not in str(raised.value)


def test_a_store_of_an_earlier_start_gets_mlflows_own_experiment(tmp_path: Path) -> None:
    path = tmp_path / "mlflow.db"
    create_database(path)
    for _ in range(2):
        ensure_default_experiment(path)
        with closing(sqlite3.connect(path)) as store:
            found = store.execute("SELECT experiment_id, name, workspace FROM experiments")
            assert found.fetchall() == [(0, "Default", "default")]


@pytest.mark.parametrize(
    ("given", "store", "uri"),
    [
        ("http://127.0.0.1:5000", "server", "http://127.0.0.1:5000"),
        ("sqlite:////data/runs.db", "sqlite", "sqlite:////data/runs.db"),
        ("postgresql://host/db", "server", "postgresql://host/db"),
        ("", "sqlite", None),
        ("  ", "sqlite", None),
    ],
)
def test_mlflow_tracking_uri_is_honoured_where_tracking_says_nothing_and_said(
    given: str, store: str, uri: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    said: list[str] = []
    resolved = resolved_tracking(composed().tracking, said.append)
    assert (resolved.store, resolved.uri) == (store, uri)
    assert bool(said) == bool(given.strip())


@pytest.mark.parametrize(
    "overrides",
    [
        ("tracking=sqlite",),
        ("tracking=none",),
        ("tracking=server", "tracking.uri=http://127.0.0.1:5000"),
        ("tracking.uri=sqlite:////data/mine.db",),
    ],
)
def test_what_tracking_says_wins_over_the_environment(
    overrides: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9999")
    said: list[str] = []
    resolved = resolved_tracking(composed(*overrides).tracking, said.append)
    assert said == [] and "9999" not in str(resolved.uri)


def test_a_password_in_the_environment_is_not_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://alice:geheim-wort@host/db")
    said: list[str] = []
    resolved_tracking(composed().tracking, said.append)
    assert said and "geheim" not in said[0]


def test_a_home_folder_is_meant_by_a_tilde(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    uri = tracking_uri(TrackingConfig(store="sqlite", uri="sqlite:///~/runs.db"), Path("/here"))
    assert sqlite_path(uri) == Path(os.environ["HOME"]) / "runs.db"
