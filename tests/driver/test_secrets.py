"""A whole sweep with secrets of many kinds: no file of it and nothing in its store has one."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.sweeping import TINY, document, job_runs, run, statuses
from tests.misbehaving import sitecustomize as fate

pytestmark = pytest.mark.slow

TYPED = (
    "'+tracking.tags.db_pass=correct horse battery'",
    "+tracking.tags.webhook=https://hooks.slack.com/services/T0/B0/xyzzy99",
    "'+tracking.tags.note=Authorization: Bearer eyJhbGciOi99'",
    "+tracking.tags.clone=https://me:Zugang-77@git.example/x.git",
    "+tracking.tags.hub=hf_AbCd1234efgh5678",
    "+tracking.tags.who=${oc.env:TEAM}",
    "batch.prompt_text=${oc.env:SMTP_PASS}",
)
ENVIRONMENT = {"TEAM": "team-rocket-9", "SMTP_PASS": "hunter2hunter2"}
HIDDEN = (
    "correct horse",
    "xyzzy99",
    "eyJhbGciOi99",
    "Zugang-77",
    "hf_AbCd1234",
    *ENVIRONMENT.values(),
)


def found_in(folder: Path) -> list[tuple[str, str]]:
    """Return the files below the folder that hold a secret, with the secret."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [
        (str(path.relative_to(folder)), secret)
        for path in files
        for secret in HIDDEN
        if secret.encode() in path.read_bytes()
    ]


def test_no_file_of_a_sweep_and_no_run_in_its_store_has_a_secret(tmp_path: Path) -> None:
    typed = [text.strip("'") for text in TYPED]
    sweep = ("-m", *TINY, *typed, f"batch.seed=1,{fate.RAISE}", "format=json")
    done = run(tmp_path, *sweep, misbehaving=True, **ENVIRONMENT)
    assert statuses(done) == ["ok", "error"], done.stderr
    assert len(job_runs(tmp_path)) == 2
    names = {path.name for path in tmp_path.rglob("*")}
    assert {"multirun.yaml", "overrides.yaml", "job.json", "worker.log", "mlflow.db"} <= names
    assert found_in(tmp_path) == []  # the output of the command is among the files


def test_the_password_of_a_store_is_in_no_file_that_the_run_leaves(tmp_path: Path) -> None:
    uri = "http://me:Zugang-77@127.0.0.1:9"
    job = ("tracking=server", f"tracking.uri={uri}", "hydra.run.dir=job", "format=json")
    done = run(tmp_path, "task=plan", "model=tiny-llama", *job)
    assert document(done)["status"] == "planned", done.stderr
    assert (tmp_path / "job" / "not_logged.json").exists()
    assert found_in(tmp_path) == []
