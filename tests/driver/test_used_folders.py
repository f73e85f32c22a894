"""A fixed hydra.run.dir or hydra.sweep.dir: no run shows, or hides behind, an earlier one."""

from __future__ import annotations

import json
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.sweeping import (
    TINY,
    delete,
    document,
    job_runs,
    nothing_is_left,
    processes,
    run,
    start,
    statuses,
    text_of,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate

pytestmark = pytest.mark.slow

HERE = ("hydra.run.dir=here", "format=json")
ENDS = [
    ("error", (f"batch.seed={fate.RAISE}",), 1),
    ("killed", (f"batch.seed={fate.KILLED}",), 1),
    ("timeout", (f"batch.seed={fate.SLEEP}", "launcher.timeout_s=6"), 1),
    ("timeout", ("launcher.timeout_s=0.05",), 1),
    ("does_not_fit", ("model=bloom-176b",), 2),
    ("refused", ("hardware.name=detect", "dtype=float16", "launcher.ranks=0"), 2),
]


def one(folder: Path, *overrides: str) -> dict[str, Any]:
    """Run once in the same folder; the document and the file say the same."""
    done = run(folder, *TINY, *HERE, *overrides, misbehaving=True)
    said = document(done)
    stored = json.loads((folder / "here" / "result.json").read_text())
    assert stored["status"] == said["status"]
    assert stored.get("run_id") == said.get("run_id")
    return said


@pytest.mark.parametrize(("status", "overrides", "code"), ENDS)
def test_a_job_in_a_folder_that_had_a_good_one_ends_as_itself(
    status: str, overrides: tuple[str, ...], code: int, tmp_path: Path
) -> None:
    first = one(tmp_path)
    assert first["status"] == "ok"
    second = run(tmp_path, *TINY, *HERE, *overrides, misbehaving=True)
    assert (second.returncode, document(second)["status"]) == (code, status)
    assert not document(second).get("metrics")
    kept = json.loads((tmp_path / "here" / "earlier" / "1" / "result.json").read_text())
    assert kept["run_id"] == first["run_id"]
    logged = [run["zinfer.status"] for run in job_runs(tmp_path)]
    assert logged[0] == "ok" and logged[1:] in ([], [status])
    nothing_is_left(tmp_path)
    third = one(tmp_path, "batch.seed=7")
    assert third["status"] == "ok" and third["run_id"] != first["run_id"]


def test_a_driver_killed_in_a_used_folder_is_closed_by_the_next_in_the_same(
    tmp_path: Path,
) -> None:
    one(tmp_path)
    process = start(tmp_path, *TINY, *HERE, f"batch.seed={fate.SLEEP}", misbehaving=True)
    events = tmp_path / "here" / "events.jsonl"
    moved = tmp_path / "here" / "earlier" / "1" / events.name  # the first attempt's
    wait_until(moved.exists, 60, "second attempt")
    wait_until(lambda: '"timed"' in text_of(events), 90, "sample")
    process.send_signal(signal.SIGKILL)
    process.wait()
    wait_until(lambda: not processes(tmp_path), 30, "end of the worker")
    last = one(tmp_path, "batch.seed=5")
    assert last["status"] == "ok"
    found = [(run["mlflow"], run["zinfer.status"]) for run in job_runs(tmp_path)]
    assert found == [("FINISHED", "ok"), ("KILLED", "killed"), ("FINISHED", "ok")]
    assert [run["repeats"] for run in job_runs(tmp_path)] == [2, 1, 2]
    nothing_is_left(tmp_path)


def test_two_commands_in_one_folder_at_once_are_one_run_and_one_refusal(tmp_path: Path) -> None:
    first = start(tmp_path, *TINY, *HERE, f"batch.seed={fate.SLEEP}", misbehaving=True)
    wait_until(lambda: (tmp_path / "here" / "events.jsonl").exists(), 60, "worker")
    other = tmp_path / "other"
    other.mkdir()
    second = run(other, *TINY, f"hydra.run.dir={tmp_path / 'here'}", "format=json")
    assert (second.returncode, document(second)["status"]) == (2, "refused")
    assert "in use by another zinfer" in document(second)["problems"][0]
    first.send_signal(signal.SIGINT)
    assert first.wait(180) == 130


def test_a_sweep_in_a_used_folder_goes_on_after_an_interrupt(tmp_path: Path) -> None:
    sweep = ("-m", *TINY, "hydra.sweep.dir=here", "format=json")
    process = start(tmp_path, *sweep, f"batch.seed=1,{fate.SLEEP}", misbehaving=True)
    second = tmp_path / "here" / "1" / "events.jsonl"
    wait_until(lambda: '"timed"' in text_of(second), 120, "second job")
    process.send_signal(signal.SIGINT)
    assert process.wait(180) == 130
    again = run(tmp_path, *sweep, f"batch.seed=1,{fate.SLEEP}")  # which behaves now
    assert statuses(again) == ["ok", "ok"]
    assert [bool(job.get("reused")) for job in document(again)["jobs"]] == [True, False]
    other = run(tmp_path, *sweep, f"batch.seed=3,{fate.RAISE}", misbehaving=True)
    assert statuses(other) == ["ok", "error"]
    nothing_is_left(tmp_path)


def test_a_job_folder_that_is_deleted_while_it_runs_costs_its_files_only(tmp_path: Path) -> None:
    process = start(tmp_path, *TINY, *HERE, "batch.repeats=400")
    events = tmp_path / "here" / "events.jsonl"
    wait_until(lambda: '"timed"' in text_of(events), 90, "sample")
    delete(tmp_path / "here")
    assert process.wait(300) == 0, (tmp_path / "stderr").read_text()
    assert json.loads((tmp_path / "stdout").read_text())["status"] == "ok"
    said = (tmp_path / "stderr").read_text()
    assert "Traceback" not in said and "was deleted while the job ran" in said
    assert [run["zinfer.status"] for run in job_runs(tmp_path)] == ["ok"]
