"""Go on with a sweep in the folder that it had, and name all its jobs in MLflow."""

from __future__ import annotations

import json
import signal
import sqlite3
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sweeping import (
    TINY,
    document,
    events_of,
    files_named,
    job_runs,
    nothing_is_left,
    run,
    runs,
    start,
    statuses,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate

pytestmark = pytest.mark.slow


def named_jobs(folder: Path) -> list[list[dict[str, Any]]]:
    """Return the jobs that each sweep's run names, the oldest sweep first."""
    return [json.loads(found["zinfer.jobs"]) for found in runs(folder) if found["role"] == "sweep"]


def test_an_interrupted_sweep_goes_on_in_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "multirun").mkdir()
    fixed = ("-m", *TINY, f"batch.seed=1,{fate.HANG},2", "hydra.sweep.dir=multirun/here")
    process = start(tmp_path, *fixed, misbehaving=True)
    wait_until(lambda: len(events_of(tmp_path, "sample")) == 2, 90, "sample of the second job")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    assert "To run those 2, and only those" in (tmp_path / "stderr").read_text()
    again = run(tmp_path, *fixed, "format=json")
    assert statuses(again) == ["ok", "ok", "ok"], again.stderr
    assert again.returncode == 0
    assert [job.get("reused", False) for job in document(again)["jobs"]] == [True, False, False]
    first, second = named_jobs(tmp_path)
    assert [job["state"] for job in first] == ["run", "run", "not_run"]
    assert [job["state"] for job in second] == ["reused", "run", "run"]
    assert first[0]["run_id"] == second[0]["run_id"]
    nothing_is_left(tmp_path)
    kept = files_named(tmp_path / "multirun" / "here" / "earlier", "result.json")
    assert len(kept) == 2  # of the attempt before


def test_a_failed_job_does_not_show_what_its_folder_held_before(tmp_path: Path) -> None:
    fixed = ("-m", *TINY, "hydra.sweep.dir=here", "format=json", "sweep.resume=false")
    assert statuses(run(tmp_path, *fixed, "batch.seed=1,2")) == ["ok", "ok"]
    failed = run(tmp_path, *fixed, f"batch.seed={fate.EXIT},2", misbehaving=True)
    assert statuses(failed) == ["error", "ok"]
    assert "generated_tokens_per_s" not in document(failed)["jobs"][0]["metrics"]
    assert [found["zinfer.status"] for found in job_runs(tmp_path)] == ["ok", "ok", "error", "ok"]


def test_every_sweep_that_was_typed_is_named_with_all_its_jobs(tmp_path: Path) -> None:
    """Also one of which everything was there: it is the newest sweep, or gets a run of its own."""
    sweep = ("-m", *TINY, "format=json")
    run(tmp_path, *sweep, "batch.seed=1,2")
    assert len(named_jobs(tmp_path)) == 1
    run(tmp_path, *sweep, "batch.seed=1,2")  # the same again
    assert len(named_jobs(tmp_path)) == 1
    run(tmp_path, *sweep, "batch.seed=2,3")
    run(tmp_path, *sweep, "batch.seed=1,3")  # all there, from two sweeps
    found = named_jobs(tmp_path)
    assert [[job["state"] for job in jobs] for jobs in found] == [
        ["run", "run"], ["reused", "run"], ["reused", "reused"],
    ]  # fmt: skip
    ids = {seed: number["run_id"] for seed, number in zip("12", found[0], strict=True)}
    assert found[1][0]["run_id"] == ids["2"]
    assert [job["run_id"] for job in found[2]] == [ids["1"], found[1][1]["run_id"]]
    assert [found["mlflow"] for found in runs(tmp_path)] == ["FINISHED"] * 6
    records = files_named(tmp_path / "mlartifacts", "sweep.json")
    stored = [json.loads(path.read_text()) for path in records]
    assert sorted(len(record["jobs"]) for record in stored) == [2, 2, 2]
    assert all({"overrides", "folder", "status"} <= stored[0]["jobs"][0].keys() for _ in stored)


@pytest.mark.parametrize(("setting", "reused"), [("false", False), ("true", True)])
def test_a_disturbed_run_is_run_again_unless_it_is_wanted(
    setting: str, reused: bool, tmp_path: Path
) -> None:
    sweep = ("-m", *TINY, "batch.seed=1,2", "format=json")
    assert statuses(run(tmp_path, *sweep)) == ["ok", "ok"]
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as store, store:
        (first, *_) = job_runs(tmp_path)
        store.execute("DELETE FROM tags WHERE key = 'zinfer.stability'")
        tag = ("zinfer.stability", "disturbed", first["run_id"])
        store.execute("INSERT INTO tags (key, value, run_uuid) VALUES (?, ?, ?)", tag)
    again = run(tmp_path, *sweep, f"sweep.reuse_disturbed={setting}")
    assert [job.get("reused", False) for job in document(again)["jobs"]] == [reused, True]


def test_what_does_not_fit_is_logged_once(tmp_path: Path) -> None:
    sweep = ("-m", *TINY, "batch.batch_size=1,1000000", "format=json")
    first = run(tmp_path, *sweep)
    assert statuses(first) == ["ok", "does_not_fit"] and first.returncode == 1
    again = run(tmp_path, *sweep)
    assert statuses(again) == ["ok", "does_not_fit"] and again.returncode == 1
    assert [job["reused"] for job in document(again)["jobs"]] == [True, True]
    assert len(job_runs(tmp_path)) == 2
    said = run(tmp_path, *sweep[:-1]).stderr
    assert "not done" not in said
