"""The report shows the sweep that was typed: jobs that it reused are its jobs too."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from multirun_analysis.__main__ import main
from multirun_analysis.store import read_mlflow
from multirun_analysis.sweeps import reused_ids
from tests.helpers.synthetic_store import FakeRun, job, write_runs
from zinfer.tracking.store import ensure_store


def resumed_sweep(folder: Path, *, tag: bool, reused_files: bool) -> tuple[str, FakeRun, FakeRun]:
    """Store a sweep of three jobs, of which the second sweep ran one and reused two."""
    uri, rng = f"sqlite:///{folder / 'mlflow.db'}", random.Random(0)
    ensure_store(uri)
    first = FakeRun(name="first", status="error", tags={"zinfer.role": "sweep"})
    earlier = [job("opt-30b", "cpu", "int4", batch, rng) for batch in (1, 2)]
    write_runs(folder / "mlflow.db", "zinfer", [first, *earlier], children_of_first=True, rng=rng)
    sweep_dir = folder / "sweep"
    second = FakeRun(
        name="second",
        status="ok",
        tags={"zinfer.role": "sweep", "zinfer.sweep_dir": str(sweep_dir)},
    )
    if tag:
        jobs = [
            {"num": number, "run_id": run.run_id, "state": "reused"}
            for number, run in enumerate(earlier)
        ]
        second.tags["zinfer.jobs"] = json.dumps([*jobs, {"num": 2, "run_id": None, "state": "run"}])
    if reused_files:
        for number, run in enumerate(earlier):
            (sweep_dir / str(number)).mkdir(parents=True)
            (sweep_dir / str(number) / "reused.json").write_text(json.dumps({"run_id": run.run_id}))
    ran = job("opt-30b", "cpu", "int4", 4, rng)
    write_runs(folder / "mlflow.db", "zinfer", [second, ran], children_of_first=True, rng=rng)
    return uri, second, ran


@pytest.mark.parametrize(
    ("tag", "reused_files"),
    [(True, False), (False, True), (True, True)],
    ids=["tag", "folder", "both"],
)
def test_a_resumed_sweep_is_all_of_its_jobs(tmp_path: Path, tag: bool, reused_files: bool) -> None:
    uri, second, ran = resumed_sweep(tmp_path, tag=tag, reused_files=reused_files)
    selection = read_mlflow(uri)
    assert selection.parent == second.run_id
    assert sorted(run.params["batch.batch_size"] for run in selection.runs) == ["1", "2", "4"]
    assert [run.run_id for run in selection.runs if not run.reused] == [ran.run_id]
    assert "2 of 3 runs measured before this sweep" in " ".join(selection.notes)


def test_without_a_list_the_children_are_the_sweep(tmp_path: Path) -> None:
    uri, _, ran = resumed_sweep(tmp_path, tag=False, reused_files=False)
    assert [run.run_id for run in read_mlflow(uri).runs] == [ran.run_id]


@pytest.mark.parametrize(
    "text", ["", "{", "null", "7", '["x", 3]', '[{"num": 1}]', "[{'run_id': 'x'}]"]
)
def test_a_list_that_cannot_be_read_says_nothing(text: str) -> None:
    assert reused_ids({"zinfer.jobs": text}) == set()


def test_a_list_that_goes_on_in_further_tags_is_read_whole() -> None:
    tags = {"zinfer.jobs": '[{"run_id": "a1"}]', "zinfer.jobs.1": '[{"run_id": "a2"}]'}
    assert reused_ids({**tags, "zinfer.jobs_x": '[{"run_id": "a3"}]'}) == {"a1", "a2"}


def test_an_id_of_a_tag_cannot_become_part_of_a_filter() -> None:
    evil = json.dumps([{"run_id": "x') or tags.a = ('"}, {"run_id": "a1"}])
    assert reused_ids({"zinfer.jobs": evil}) == {"a1"}


def test_the_sweeps_run_carries_the_report_and_a_description(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, second, _ = resumed_sweep(tmp_path, tag=True, reused_files=False)
    main(["--uri", uri, "--out", str(tmp_path / "report")])
    client = MlflowClient(uri)
    paths = {item.path for item in client.list_artifacts(second.run_id, "report")}
    assert {"report/report.html", "report/tables", "report/figures", "report/data"} <= paths
    note = client.get_run(second.run_id).data.tags["mlflow.note.content"]
    assert note.startswith("3 measured.") and "| opt-30b |" in note and len(note) < 8000


def test_no_upload_leaves_the_store_as_it_was(tmp_path: Path) -> None:
    from mlflow import MlflowClient

    uri, second, _ = resumed_sweep(tmp_path, tag=True, reused_files=False)
    main(["--uri", uri, "--out", str(tmp_path / "report"), "--no-upload"])
    client = MlflowClient(uri)
    assert client.list_artifacts(second.run_id) == []
    assert "mlflow.note.content" not in client.get_run(second.run_id).data.tags
