"""All runs for other tools: one row a run, units in names; and text of users that stays text."""

from __future__ import annotations

import csv
import json
import random
from pathlib import Path

import pytest

from multirun_analysis import runs_frame
from multirun_analysis.frame import typed
from multirun_analysis.report import write_report
from multirun_analysis.store import read_mlflow
from tests.helpers.report_gallery import make_story
from tests.helpers.synthetic_store import job, write_runs
from zinfer.tracking.store import ensure_store


def test_csv_json_lines_parquet_and_frame_hold_the_same_runs(tmp_path: Path) -> None:
    import pandas

    uri = make_story("one-batch", tmp_path / "store")
    write_report(read_mlflow(uri), tmp_path / "out")
    data = tmp_path / "out" / "data"
    frame = runs_frame(uri)
    rows = list(csv.DictReader((data / "runs.csv").open()))
    lines = [json.loads(line) for line in (data / "runs.jsonl").read_text().splitlines()]
    stored = pandas.read_parquet(data / "runs.parquet")
    assert list(rows[0]) == list(frame.columns) == list(stored.columns)
    ids = list(frame["run_id"])
    assert ids == [row["run_id"] for row in rows] == [line["run_id"] for line in lines]
    assert ids == list(stored["run_id"]) and len(set(ids)) == 3
    rate = "generated_tokens_per_s"
    assert list(frame[rate]) == list(stored[rate]) == [line[rate] for line in lines]
    assert list(frame["batch.batch_size"]) == [8, 8, 8]
    assert frame["started"].dt.tz is not None
    assert list(frame["stability"].dropna()) == ["disturbed"]


def test_the_python_door_reads_the_same_frame_newest_first(tmp_path: Path) -> None:
    import zinfer

    uri = make_story("one-batch", tmp_path / "store")
    frame = runs_frame(uri)
    experiment = frame["experiment"][0]
    door = zinfer.load_runs(uri=uri, experiment=experiment)
    assert list(door.columns) == list(runs_frame(uri, experiment=experiment).columns)
    assert set(door["run_id"]) >= set(frame["run_id"])
    assert door["started"].is_monotonic_decreasing
    few = zinfer.load_runs(uri=uri, experiment=experiment, where="tags.`zinfer.status` = 'ok'")
    assert set(few["status"]) == {"ok"}
    with pytest.raises(ValueError, match="there is no experiment none"):
        zinfer.load_runs(uri=uri, experiment="none")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("8", 8), ("0.05", 0.05), ("true", True), ("false", False), ("1e9", 1e9),
        ("nan", "nan"), ("inf", "inf"), ("opt-30b", "opt-30b"), ("", ""),
    ],
)  # fmt: skip
def test_choices_get_their_types_back(text: str, value: object) -> None:
    assert typed(text) == value and type(typed(text)) is type(value)


EVIL = ("[/x]", "=cmd|' /C calc'!A0", "[x](javascript:alert(1))", "<script>alert(1)</script>",
        "a|b", "\x1b[31mred", "$x_1$ \\input{y}")  # fmt: skip


@pytest.mark.parametrize("name", EVIL)
def test_text_of_users_is_text_everywhere(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from multirun_analysis.__main__ import main

    uri, rng = f"sqlite:///{tmp_path / 'mlflow.db'}", random.Random(0)
    ensure_store(uri)
    runs = [job("opt-30b", "cpu", "int4", batch, rng) for batch in (4, 8)]
    for run in runs:
        run.params["model.name"] = run.name = name
        run.tags["zinfer.warnings"] = name
    write_runs(tmp_path / "mlflow.db", name, runs, rng=rng)
    main(["--uri", uri, "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert "\x1b" not in said and ("[/x]" in said or name != "[/x]")
    out = tmp_path / "out"
    for path in (out / "report.html", out / "report.md", *(out / "tables").glob("*.md")):
        text = path.read_text()
        assert "<script>alert" not in text, path.name
        assert path.suffix == ".html" or "[x](javascript:" not in text, path.name
    for path in [*(out / "tables").glob("*.csv"), out / "data" / "runs.csv"]:
        cells = [cell for row in csv.reader(path.open()) for cell in row]
        assert not [cell for cell in cells if cell.startswith("=")], path.name
    for path in (out / "tables").glob("*.tex"):
        assert r"\input{" not in path.read_text() and "$x_1$" not in path.read_text()


def test_machines_with_other_instruction_sets_are_two_rows(tmp_path: Path) -> None:
    uri, rng = f"sqlite:///{tmp_path / 'mlflow.db'}", random.Random(0)
    ensure_store(uri)
    runs = [
        job("opt-30b", "cpu", "int4", 8, rng, **{"zinfer.hardware": fingerprint})
        for fingerprint in ("aaaaaaaaaaaa", "bbbbbbbbbbbb")
    ]
    write_runs(tmp_path / "mlflow.db", "zinfer", runs, rng=rng)
    report = write_report(read_mlflow(uri), tmp_path / "out")
    assert len(report.runs.rows) == 2
    devices = {item.configuration.context.device for item in report.best}
    assert devices == {"NVIDIA RTX A6000 (aaaaaa)", "NVIDIA RTX A6000 (bbbbbb)"}
    assert any("Runs of 2 machines are here" in note for note in report.notes)


def test_plans_for_a_published_box_stand_beside_its_published_rows(tmp_path: Path) -> None:
    report = write_report(
        read_mlflow(make_story("plans-only", tmp_path / "store")), tmp_path / "out"
    )
    assert report.runs.rows == () and [figure.name for figure in report.figures] == ["plans"]
    plans, published = report.table("plans"), report.table("published")
    assert plans is not None and published is not None and len(plans.rows) == 4
    heads = [column.head for column in plans.columns]
    assert "hardware.device_bytes" not in heads and "box a6000" in plans.note
    keys = [column.key for column in published.columns]
    beside = [
        row for row in published.rows if row[keys.index("planned_ceiling_per_s")].value is not None
    ]
    values = {row[keys.index("published")].text for row in beside}
    assert {"22.74", "7.68", "1.21", "0.65"} <= values


def test_sizes_of_a_model_are_numbers_as_params_of_today_and_as_metrics_of_before(
    tmp_path: Path,
) -> None:
    uri, rng = f"sqlite:///{tmp_path / 'mlflow.db'}", random.Random(0)
    ensure_store(uri)
    before, now = (job("opt-30b", "cpu", "int4", batch, rng) for batch in (4, 8))
    size = now.metrics.pop("model_parameters")
    now.params["model_parameters"] = str(int(size))
    write_runs(tmp_path / "mlflow.db", "zinfer", [before, now], rng=rng)
    runs = read_mlflow(uri).runs
    assert [run.metrics["model_parameters"] for run in runs] == [size, size]
    assert not [run for run in runs if "model_parameters" in run.params]


def test_verdicts_and_warnings_of_runs_are_in_the_report(tmp_path: Path) -> None:
    report = write_report(
        read_mlflow(make_story("one-batch", tmp_path / "store")), tmp_path / "out"
    )
    said = next(number for number, note in enumerate(report.notes) if "disturbed" in note)
    assert report.notes[said] == "1 run disturbed. Run them again before you rely on them."
    reasons = "the machine was 2.3 times slower; other processes took a core."
    assert report.notes[said + 1].endswith(f": {reasons}")
    warnings = report.table("warnings")
    assert warnings is not None and warnings.rows[0][0].text == "disturbed"
    assert "disturbed" in (tmp_path / "out" / "tables" / "runs.tex").read_text()
