"""Optuna chooses the jobs: it is told tokens/s, and jobs that fail lead it nowhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.sweeping import TINY, document, job_runs, nothing_is_left, run, runs, statuses
from tests.misbehaving import sitecustomize as fate

pytest.importorskip(
    "hydra_plugins.hydra_optuna_sweeper", reason="needs pip install 'zinfer[search]'"
)
pytestmark = pytest.mark.slow

SEARCH = (
    "-m",
    "hydra/sweeper=fastest",
    "hydra.sweeper.n_trials=6",
    "hydra.sweeper.sampler._target_=optuna.samplers.RandomSampler",
    "~hydra.sweeper.sampler.n_startup_trials",
    "plan.headroom=0.9",  # a batch of 2^20 rows fits no machine then
)


def test_a_search_survives_its_jobs_says_the_best_and_goes_on(tmp_path: Path) -> None:
    space = (f"batch.seed=1,{fate.KILLED}", "batch.batch_size=1,8,1048576")
    done = run(tmp_path, *SEARCH, *TINY, *space, misbehaving=True)
    assert done.returncode == 1, done.stderr
    assert "[1/6]" in done.stderr and " left)" in done.stderr, "six trials are known to come"
    assert "best of" in done.stdout
    assert "batch.batch_size=" in done.stdout.partition("best of")[2]
    nothing_is_left(tmp_path)
    first = {logged["zinfer.status"] for logged in job_runs(tmp_path)}
    assert {"ok", "killed"} <= first <= {"ok", "killed", "does_not_fit"}
    again = run(tmp_path, *SEARCH, *TINY, *space, "format=json")
    found = document(again)["jobs"]
    assert len(found) == 6
    assert any(job.get("reused") for job in found if job["status"] == "ok")
    assert set(statuses(again)) <= {"ok", "does_not_fit"}
    parents = {logged["run_id"] for logged in runs(tmp_path) if logged["role"] == "sweep"}
    assert {logged["mlflow.parentRunId"] for logged in job_runs(tmp_path)} == parents


def test_a_search_in_which_no_job_ends_well_is_a_sentence(tmp_path: Path) -> None:
    done = run(
        tmp_path, *SEARCH, *TINY, "hydra.sweeper.n_trials=2",
        "batch.batch_size=1048576,3000000000",
    )  # fmt: skip
    assert done.returncode == 2
    assert "no job has generated_tokens_per_s, so none is best" in done.stdout
    assert "the sweep's launcher or sweeper stopped: ValueError" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_search_for_the_slowest_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, *SEARCH, *TINY, "hydra.sweeper.direction=minimize", "batch.batch_size=1,2")
    assert done.returncode == 2
    assert "Set hydra.sweeper.direction=maximize" in done.stderr + done.stdout
