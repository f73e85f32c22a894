"""Which earlier runs stand for the jobs of a sweep, and what the sweep says of them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from zinfer.job.outcome import EndedBy
from zinfer.sweep.earlier_runs import EarlierRun
from zinfer.sweep.end import Row, exit_code, how_to_go_on
from zinfer.sweep.record import Sweep, SweepJob
from zinfer.sweep.resume import note_reused, standing, with_refusals_kept, would_retry
from zinfer.tracking.parent import TAG_CHARACTERS, SweptRun, jobs_tags


def earlier(status: Any = "ok", run_id: str = "r", **fields: Any) -> EarlierRun:
    return EarlierRun(key="k", run_id=run_id, status=status, **fields)


@pytest.mark.parametrize(
    ("status", "ended_by", "retry", "again"),
    [
        ("error", EndedBy.ITSELF, "failed", True),
        ("error", EndedBy.ITSELF, "oom", False),
        ("error", EndedBy.ITSELF, "none", False),
        ("oom_host", EndedBy.ITSELF, "oom", True),
        ("oom_device", EndedBy.ITSELF, "failed", True),
        ("oom_device", EndedBy.ITSELF, "none", False),
        ("killed", EndedBy.INTERRUPTED, "none", True),
        ("killed", EndedBy.DRIVER_KILLED, "none", True),
        ("killed", EndedBy.ITSELF, "none", False),
    ],
)
def test_retry_says_which_failures_are_run_again(
    status: str, ended_by: EndedBy, retry: str, again: bool
) -> None:
    assert would_retry(status, ended_by, retry) is again


@pytest.mark.parametrize(
    ("runs", "retry", "reuse_disturbed", "stands"),
    [
        ([earlier()], "failed", False, "r"),
        ([earlier(stability="noisy")], "failed", False, "r"),
        ([earlier(stability="disturbed")], "failed", False, None),
        ([earlier(stability="disturbed")], "failed", True, "r"),
        ([earlier(run_id="old"), earlier(stability="disturbed")], "failed", False, "old"),
        ([earlier(run_id="old"), earlier(stability="disturbed")], "failed", True, "old"),
        ([earlier(run_id="old"), earlier()], "failed", False, "r"),
        ([earlier(run_id="old"), earlier("error")], "failed", False, "old"),
        ([earlier(run_id="old"), earlier("error")], "none", False, "old"),
        ([earlier("error", run_id="old"), earlier()], "none", False, "r"),
        ([earlier("error")], "failed", False, None),
        ([earlier("error")], "none", False, "r"),
        ([earlier("does_not_fit")], "failed", False, "r"),
        ([earlier("does_not_fit", run_id="old"), earlier("error")], "failed", False, None),
        ([earlier("killed", ended_by=EndedBy.INTERRUPTED)], "none", False, None),
    ],
)
def test_the_best_run_that_says_something_stands(
    runs: list[EarlierRun], retry: str, reuse_disturbed: bool, stands: str | None
) -> None:
    found = standing(runs, retry=retry, reuse_disturbed=reuse_disturbed).get("k")
    assert (found.run_id if found else None) == stands


def sweep(tmp_path: Path, **changes: Any) -> Sweep:
    fields: dict[str, Any] = {
        "folder": tmp_path, "attempt": "a", "command": "zinfer -m x=1,2", "output_format": "text",
        "tracking_uri": "sqlite:///x.db", "experiment": "zinfer", "resumes": True,
        "retry": "failed", "fail_fast": False, "preview": False, "local": True, "in_process": True,
        "forked": False, "started_s": 0.0, "pid": 1, "jobs": [],
    }  # fmt: skip
    return Sweep(**{**fields, **changes})


@pytest.mark.parametrize(
    ("verdict", "local", "state"),
    [("does_not_fit", True, "reused"), ("fits", True, "run"), ("unknown", True, "run"),
     ("does_not_fit", False, "run")],
)  # fmt: skip
def test_what_did_not_fit_stands_until_its_plan_fits(
    verdict: Any, local: bool, state: str, tmp_path: Path
) -> None:
    job = SweepJob(num=0, overrides=[], folder="0", verdict=verdict, key="k")
    found = with_refusals_kept(
        sweep(tmp_path, jobs=[job], reusable={"k": earlier("does_not_fit")}, local=local)
    )
    assert found.jobs is not None and found.jobs[0].state == state


@pytest.mark.parametrize("where", [".", "earlier/1", "../earlier/2/0"])
def test_a_reused_job_shows_its_own_run_wherever_its_files_are(where: str, tmp_path: Path) -> None:
    """The store knows the run's numbers; files are that run's only where they name it."""
    job_dir = tmp_path / "sweep" / "0"
    for folder, run_id, rate in ((job_dir, "another", 9.0), (job_dir / where, "r", 2.0)):
        folder.mkdir(parents=True, exist_ok=True)
        document = {"status": "error", "run_id": run_id, "model": run_id, "metrics": {"x": rate}}
        (folder / "result.json").write_text(json.dumps(document))
    run = earlier(job_dir=str(job_dir), metrics={"generated_tokens_per_s": 2.5})
    found = note_reused(run, tmp_path / "new" / "0")
    assert (found["status"], found["run_id"], found["model"]) == ("ok", "r", "r")
    assert found["metrics"] == {"x": 2.0, "generated_tokens_per_s": 2.5}
    assert json.loads((tmp_path / "new" / "0" / "reused.json").read_text()) == found


def test_a_reused_job_never_shows_another_job_s_numbers(tmp_path: Path) -> None:
    (tmp_path / "0").mkdir()
    other = {"status": "ok", "run_id": "another", "metrics": {"generated_tokens_per_s": 9.0}}
    (tmp_path / "0" / "result.json").write_text(json.dumps(other))
    run = earlier(job_dir=str(tmp_path / "0"), metrics={"generated_tokens_per_s": 2.5})
    assert note_reused(run, tmp_path / "1")["metrics"] == {"generated_tokens_per_s": 2.5}


def row(status: str | None, tmp_path: Path, **fields: Any) -> Row:
    document = None if status is None else {"status": status, **fields}
    return Row(num=0, overrides=[], folder=tmp_path, document=document)


COMMAND = "zinfer -m x=1,2"


@pytest.mark.parametrize(
    ("statuses", "changes", "words", "unsaid"),
    [
        (["ok", "does_not_fit"], {}, [], ["not done", COMMAND]),
        (["ok", None], {}, ["1 of 2 jobs not done", f"those 1, and only those: {COMMAND}"], []),
        (["ok", "error"], {"retry": "none"}, ["sweep.retry=failed"], [COMMAND]),
        (["ok", "oom_host"], {"retry": "oom"}, [f"only those: {COMMAND}"], []),
        (["ok", "error"], {"retry": "oom"}, ["sweep.retry=failed"], [COMMAND]),
        (["ok", "refused"], {}, ["1 refused"], [COMMAND]),
        (["ok", None], {"resumes": False}, ["whole sweep", "sweep.resume=false"], ["only those"]),
        (["ok", None], {"resumes": False, "tracking_uri": None}, ["tracking=none"], ["only those"]),
        (["ok", None], {"jobs": None}, [f"To go on: {COMMAND}"], ["only those"]),
    ],
)
def test_what_is_said_of_going_on_is_what_the_command_would_do(
    statuses: list[str | None],
    changes: dict[str, Any],
    words: list[str],
    unsaid: list[str],
    tmp_path: Path,
) -> None:
    rows = [row(status, tmp_path) for status in statuses]
    said = "\n".join(how_to_go_on(sweep(tmp_path, **changes), rows, interrupted=False))
    assert all(word in said for word in words), said
    assert not any(word in said for word in unsaid), said


@pytest.mark.parametrize(
    ("verdict", "changes", "said"),
    [
        ("disturbed", {}, True),
        ("disturbed", {"reuse_disturbed": True}, False),
        ("disturbed", {"resumes": False}, False),
        ("noisy", {}, False),
    ],
)
def test_disturbed_results_are_named_where_they_would_be_measured_again(
    verdict: str, changes: dict[str, Any], said: bool, tmp_path: Path
) -> None:
    rows = [row("ok", tmp_path, stability={"verdict": verdict}), row("ok", tmp_path)]
    lines = how_to_go_on(sweep(tmp_path, **changes), rows, interrupted=False)
    assert ["1 disturbed" in line for line in lines] == [True] * said


@pytest.mark.parametrize(
    ("statuses", "code"),
    [
        (["ok", "planned"], 0),
        (["ok", "does_not_fit"], 1),
        (["refused", "does_not_fit"], 2),
        (["ok", None], 1),
        (["error", "refused"], 1),
    ],
)
def test_the_exit_code_is_of_all_jobs(
    statuses: list[str | None], code: int, tmp_path: Path
) -> None:
    rows = [row(status, tmp_path) for status in statuses]
    assert exit_code(rows, interrupted=False) == code
    assert exit_code(rows, interrupted=True) == 130


@pytest.mark.parametrize("count", [0, 1, 3, 500])
def test_the_sweep_s_run_names_every_job_within_mlflow_s_limit(count: int) -> None:
    runs = [SweptRun(num=num, run_id=f"{num:032x}", state="reused") for num in range(count)]
    tags = jobs_tags(runs)
    assert all(len(value) <= TAG_CHARACTERS for value in tags.values())
    assert list(tags)[:2] == ["zinfer.jobs", "zinfer.jobs.1"][: len(tags)]
    found = [entry for value in tags.values() for entry in json.loads(value)]
    assert found == [
        {"num": num, "run_id": f"{num:032x}", "state": "reused"} for num in range(count)
    ]
