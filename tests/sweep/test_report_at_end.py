"""A sweep's report at its end: written, uploaded, and never the sweep's problem."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from tests.helpers.tracked_runs import OUTCOME, config_of, opened
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal
from zinfer.sweep import report
from zinfer.sweep.record import Sweep
from zinfer.tracking.client import connect
from zinfer.tracking.parent import SweptRun, announce_parent, close_parent, created_parent


def sweep_in(folder: Path, **fields: object) -> Sweep:
    """Return the record of a sweep in `folder`, with a store there."""
    given = {
        "folder": folder, "attempt": "a", "command": "zinfer -m", "output_format": "text",
        "tracking_uri": f"sqlite:///{folder}/mlflow.db", "experiment": "zinfer",
        "resumes": True, "retry": "failed", "fail_fast": False, "preview": False, "local": True,
        "in_process": True, "forked": False, "started_s": 0.0, "pid": 1, "jobs": [], **fields,
    }  # fmt: skip
    return Sweep(**given)  # type: ignore[arg-type]


def swept(folder: Path, count: int) -> list[SweptRun]:
    """Log so many ended runs under a sweep's run, and end that too."""
    file = announce_parent(folder, ["offload=none,cpu"])
    runs = []
    for num in range(count):
        overrides = (f"batch.batch_size={num + 1}", f"sweep.parent_run_id={file}")
        run = opened(config_of(*overrides))
        run.finish(OUTCOME)
        runs.append(SweptRun(num=num, run_id=run.run_id, state="run"))
    close_parent(file, None, "ok", runs)
    return runs


@pytest.fixture(autouse=True)
def in_the_sweeps_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZINFER_PARENT_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


@pytest.mark.slow
def test_the_sweeps_run_has_its_report_table_and_figures(tmp_path: Path) -> None:
    runs = swept(tmp_path, 2)
    page = report.report_sweep(sweep_in(tmp_path), runs, Terminal("text"))
    assert page == tmp_path / "report" / "report.html"
    parent = created_parent(tmp_path / "parent_run.json")
    client = connect(f"sqlite:///{tmp_path}/mlflow.db")
    logged = {Path(item.path).name for item in client.list_artifacts(str(parent), "report")}
    assert {"report.html", "report.md", "tables", "figures", "data"} <= logged
    assert "report/report.html" in client.get_run(str(parent)).data.tags["mlflow.note.content"]
    assert not (tmp_path / "report.log").exists()


@pytest.mark.parametrize(("count", "wanted"), [(1, True), (2, False)])
def test_a_single_run_and_a_sweep_that_wants_none_have_no_report(
    tmp_path: Path, count: int, wanted: bool
) -> None:
    runs = swept(tmp_path, count)
    assert report.report_sweep(sweep_in(tmp_path, report=wanted), runs, Terminal("text")) is None
    assert not (tmp_path / "report").exists()


def test_a_report_that_hangs_is_ended_and_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(report, "WAIT_S", 0.2)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert report._run(command, tmp_path / "log", None) == "it was not done after 0 s"


def test_ctrl_c_ends_a_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Interrupts, "received", True)
    command = [sys.executable, "-c", "import time; time.sleep(600)"]
    assert report._run(command, tmp_path / "log", None) == "interrupted"


def test_a_report_that_fails_leaves_the_sweep_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    runs = swept(tmp_path, 2)
    monkeypatch.setattr(report.sys, "executable", str(tmp_path / "python"))
    assert report.report_sweep(sweep_in(tmp_path), runs, Terminal("text")) is None
    said = capfd.readouterr().err
    assert "no report:" in said and "To write it: zinfer-report --run" in said


def test_the_last_line_of_a_failed_report_is_its_reason(tmp_path: Path) -> None:
    command = [sys.executable, "-c", "print('first'); raise SystemExit('the disk is full')"]
    assert report._run(command, tmp_path / "log", None) == "the disk is full"
    command = [sys.executable, "-c", "raise SystemExit(3)"]
    assert report._run(command, tmp_path / "log", None) == "it ended with exit code 3"


def test_credentials_of_the_store_are_in_no_argument(tmp_path: Path) -> None:
    shown = "import os, sys; sys.exit(f'{sys.argv[1:]} {os.environ[\"MLFLOW_TRACKING_URI\"]}')"
    command = [sys.executable, "-c", shown]
    said = report._run(command, tmp_path / "log", "http://user:secret@host:5000")
    assert said == "[] http://user:secret@host:5000"
