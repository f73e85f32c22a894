"""A report says what it does while it reads and draws; a log gets one line for each step."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from multirun_analysis import queries
from multirun_analysis.folders import read_folder
from multirun_analysis.progress import LogLines, step_text
from multirun_analysis.report import write_report
from multirun_analysis.store import read_mlflow
from tests.helpers.synthetic_store import make_store

Steps = list[tuple[str, int, int | None]]


def test_reading_and_drawing_count_how_far_they_are(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(queries, "PAGE", 10)
    steps: Steps = []

    def note(step: str, done: int = 0, total: int | None = None) -> None:
        steps.append((step, done, total))

    uri = make_store(tmp_path, runs=15)
    selection = read_mlflow(uri, experiment="zinfer", progress=note)
    (step, done, total), *_ = steps
    assert (step, done) == ("reading runs", 10)
    assert total is not None and total >= len(selection.runs) > 10
    write_report(selection, tmp_path / "out", progress=note)
    drawing = [(done, total) for step, done, total in steps if step == "drawing figures"]
    assert drawing == [(number, len(drawing)) for number in range(1, len(drawing) + 1)]
    assert [step for step, done, _ in steps if done in (0, 1)] == [
        f"comparing {len(selection.runs)} runs", "drawing figures", "writing the report",
    ]  # fmt: skip


def test_job_folders_are_counted(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / str(number)).mkdir()
        (tmp_path / str(number) / "result.json").write_text('{"status": "killed"}')
    steps: Steps = []
    read_folder(tmp_path, lambda step, done=0, total=None: steps.append((step, done, total)))
    assert steps == [("reading runs", number, 3) for number in (1, 2, 3)]


@pytest.mark.parametrize(
    ("done", "total", "text"),
    [
        (0, None, "reading runs"),
        (500, None, "reading runs: 500 so far"),
        (3, 11, "reading runs: 3 of 11"),
        (1250, 1003, "reading runs: 1003 of 1003"),
    ],
)
def test_a_step_says_how_far_it_is(done: int, total: int | None, text: str) -> None:
    assert step_text("reading runs", done, total) == text


def test_a_log_gets_one_line_for_each_step() -> None:
    log = io.StringIO()
    show = LogLines(log)
    for done in range(1, 12):
        show("drawing figures", done, 11)
    show("writing the report")
    assert log.getvalue().splitlines() == [
        "zinfer-report: drawing figures",
        "zinfer-report: writing the report",
    ]
