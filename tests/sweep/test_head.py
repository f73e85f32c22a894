"""The head of a sweep: it refuses as a run does, and one bad job is refused alone."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.sweeping import TINY, document, run, start, statuses, wait_until
from zinfer.config import ConfigError
from zinfer.sweep.folders import require_folders

SWEEP = ("-m", *TINY, "tracking=none")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("model=glob(nothing*)",), ["model=glob(nothing*)", "Set model="]),
        (("batch.batch_size=range(3,3)",), ["batch.batch_size=range(3,3)"]),
        (("model=tiny-llama,nope",), ["model=nope does not exist"]),
        (("batch.batch_size=1,2", "batch.batchsize=3"), ["batchsize"]),
        (("batch.batch_size=1,2", "hydra.sweep.dir=${oc.env:NOPE}"), ["hydra.sweep.dir", "NOPE"]),
        (("batch.seed=1,2", "hydra.sweep.subdir=${oc.env:NOPE}"), ["hydra.sweep.subdir", "NOPE"]),
        (("batch.seed=1,2", "hydra.sweep.subdir=same"), ["jobs 0 and 1", "/same", "hydra.job.num"]),
        (("batch.seed=1,2", f"hydra.sweep.subdir={'x' * 300}"), ["300 bytes", "hydra.job.num"]),
        (("batch.seed=1,2", "hydra.sweep.dir=/proc/nowhere"), ["/proc/nowhere"]),
        (("batch.seed=1,2", "hydra.sweep.dir=a_file/sweep"), ["a_file is not a folder"]),
        (("batch.seed=interval(1,2)",), ["INTERVAL"]),
    ],
)
def test_a_sweep_that_cannot_begin_is_refused_with_one_document(
    arguments: tuple[str, ...], words: list[str], tmp_path: Path
) -> None:
    (tmp_path / "a_file").touch()
    done = run(tmp_path, *SWEEP, *arguments, "format=json")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    refused = document(done)
    assert refused["status"] == "refused"
    said = " ".join(refused["problems"])
    assert all(word in said for word in words), said
    assert not (tmp_path / "multirun").exists()


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        ("batch.batch_size=1,${oc.env:NOPE}", "NOPE"),
        ("batch.batch_size=1,${model.nope}", "nope"),
        ("batch.repeats=1,0", "batch.repeats=0"),
        ("model.source=null,[1]", "model.source"),
    ],
)
def test_a_job_that_does_not_compose_is_refused_alone(bad: str, words: str, tmp_path: Path) -> None:
    done = run(tmp_path, *SWEEP, bad, "sweep.preview=true", "format=json")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stderr
    good, refused = document(done)["jobs"]
    assert (good["verdict"], refused["verdict"]) == ("fits", "refused")
    assert words in refused["reason"]
    assert not (tmp_path / "multirun").exists()  # a preview leaves nothing


@pytest.mark.parametrize(
    ("points", "planned"),
    [
        ("batch.batch_size=1,${oc.env:NOPE}", ["planned", "refused"]),
        ("batch.batch_size=${oc.env:ONE},${oc.env:NOPE}", ["planned", "refused"]),
        ("batch.repeats=0,1", ["refused", "planned"]),
    ],
)
def test_a_point_of_a_grid_is_refused_alone(
    points: str, planned: list[str], tmp_path: Path
) -> None:
    done = run(tmp_path, *SWEEP, "task=plan", points, "format=json", ONE="1")
    assert [row["status"] for row in document(done)["plans"]] == planned, done.stderr
    assert done.returncode == 2


def test_a_grid_without_points_is_refused(tmp_path: Path) -> None:
    done = run(tmp_path, *SWEEP, "task=plan", "model=glob(nothing*)", "format=json")
    assert done.returncode == 2
    assert "model=glob(nothing*)" in document(done)["problems"][0]


def test_a_folder_in_which_a_sweep_runs_is_not_taken_from_it(tmp_path: Path) -> None:
    fixed = (*SWEEP, "batch.seed=1,2", "hydra.sweep.dir=sweep", "format=json")
    other = tmp_path / "other"
    other.mkdir()
    first = start(tmp_path, *fixed, "batch.repeats=200")
    try:
        wait_until((tmp_path / "sweep" / "sweep.json").exists, 60, "sweep")
        here = [argument.replace("=sweep", f"={tmp_path}/sweep") for argument in fixed]
        second = run(other, *here)
        assert second.returncode == 2
        assert "is in use by a sweep" in document(second)["problems"][0]
    finally:
        first.terminate()
        first.wait(60)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("subdir", "folders"),
    [
        ("${hydra.job.override_dirname}", None),
        ("${model.name}/seed_${batch.seed}", ["tiny-llama/seed_1", "tiny-llama/seed_2"]),
        ("job ${hydra:job.num}", ["job 0", "job 1"]),
    ],
)
def test_a_job_s_folder_is_what_hydra_says(
    subdir: str, folders: list[str] | None, tmp_path: Path
) -> None:
    sweep = ("-m", *TINY, "batch.seed=1,2", f"hydra.sweep.subdir={subdir}", "format=json")
    done = run(tmp_path, *sweep, "hydra.sweep.dir=sweep")
    assert statuses(done) == ["ok", "ok"], done.stderr
    assert done.returncode == 0
    found = sorted(
        str(path.parent.relative_to(tmp_path / "sweep"))
        for path in (tmp_path / "sweep").rglob("result.json")
    )
    assert len(found) == 2 and (folders is None or found == folders)
    again = run(tmp_path, *sweep, "hydra.sweep.dir=again")
    assert [job["reused"] for job in document(again)["jobs"]] == [True, True]
    assert len(list((tmp_path / "again").rglob("reused.json"))) == 2


@pytest.mark.slow
def test_jobs_in_folders_outside_the_sweep_s_own_find_their_sweep(tmp_path: Path) -> None:
    """hydra.sweep.dir itself may contain what is swept."""
    done = run(
        tmp_path, *SWEEP, "batch.seed=1,2", "hydra.sweep.dir=seed_${batch.seed}", "format=json"
    )
    assert statuses(done) == ["ok", "ok"], done.stderr
    records = [json.loads(path.read_text()) for path in tmp_path.rglob("result.json")]
    assert [record["status"] for record in records] == ["ok", "ok"]


def test_many_bad_folders_are_said_in_three_sentences_and_a_number(tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as refused:
        require_folders((num, tmp_path / "same") for num in range(10))
    assert len(refused.value.problems) == 4
    assert refused.value.problems[-1].startswith("6 more jobs")
