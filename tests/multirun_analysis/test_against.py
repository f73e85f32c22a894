"""Now against before: paired rows, a ratio with its error, and the exit code."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from multirun_analysis import __main__ as command
from multirun_analysis.__main__ import main
from multirun_analysis.against import changed_predictions, commit_named, compare_against
from multirun_analysis.command import share
from multirun_analysis.runs import Run, Selection
from tests.helpers.invented_runs import run
from tests.helpers.synthetic_store import FakeRun, job, write_runs
from zinfer.tracking.store import ensure_store

OLD, NEW = "a" * 40, "b" * 40
NAMES = ("NAME", "EMAIL")


def selection(*runs: Run) -> Selection:
    return Selection(title="now", where="here", runs=runs)


def numbered(one: Run, run_id: str, **metrics: float) -> Run:
    return replace(one, run_id=run_id, metrics={**one.metrics, **metrics})


def pair_of(now: float, before: float, stddev: float | None) -> object:
    """Pair one configuration at these rates, both with this standard deviation."""
    runs = []
    for name, rate in (("now", now), ("before", before)):
        one = numbered(run(rate), name)
        metrics = {key: value for key, value in one.metrics.items() if not key.endswith("_stddev")}
        metrics |= {} if stddev is None else {"generated_tokens_per_s_stddev": stddev}
        runs.append(replace(one, metrics=metrics))
    (pair,) = compare_against(selection(runs[0]), selection(runs[1])).pairs
    return pair


@pytest.mark.parametrize(
    ("now", "before", "stddev", "verdict", "fails", "fails_beyond_5_percent"),
    [
        (10.0, 10.0, 0.1, "within spread", False, False),
        (9.8, 10.0, 0.1, "slower", True, False),
        (9.9, 10.0, 0.1, "within spread", False, False),
        (9.0, 10.0, 0.1, "slower", True, True),
        (9.0, 10.0, 2.0, "within spread", False, False),
        (11.0, 10.0, 0.1, "faster", False, False),
        (9.0, 10.0, None, "slower, measured once", True, True),
    ],
)
def test_slower_is_what_the_error_does_not_explain(
    now: float,
    before: float,
    stddev: float | None,
    verdict: str,
    fails: bool,
    fails_beyond_5_percent: bool,
) -> None:
    pair = pair_of(now, before, stddev)
    assert pair.verdict == verdict  # type: ignore[attr-defined]
    assert pair.fails(0.0) is fails  # type: ignore[attr-defined]
    assert pair.fails(0.05) is fails_beyond_5_percent  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    "other",
    [
        run(10.0, weights="pretrained"),
        run(10.0, tags={"zinfer.hardware": "another box"}),
        run(10.0, tags={"zinfer.method_version": "0"}),
        run(10.0, batch_batch_size="16"),
    ],
)
def test_other_machines_weights_methods_and_choices_are_never_paired(other: Run) -> None:
    found = compare_against(selection(run(9.0)), selection(numbered(other, "before")))
    assert found.pairs == ()
    assert "1 configuration of 1 without a pair" in found.notes[0]


def test_what_no_longer_runs_fails() -> None:
    now = numbered(run(status="oom_host"), "now")
    (pair,) = compare_against(selection(now), selection(run(10.0))).pairs
    assert pair.fails(0.5) and pair.verdict == "now out of host memory"


def test_predictions_that_changed_are_named() -> None:
    before = numbered(run(10.0), "1", predicted_decode_step_s=0.5, plan_host_needed_bytes=1e9)
    now = numbered(run(10.0), "2", predicted_decode_step_s=0.4, plan_host_needed_bytes=1e9)
    (pair,) = compare_against(selection(now), selection(before)).pairs
    assert changed_predictions(pair) == [
        "opt-30b, weights in host memory, bfloat16, batch 8: step s 0.5 -> 0.4"
    ]


@pytest.mark.parametrize(("text", "value"), [("5%", 0.05), ("0.05", 0.05), ("0", 0.0)])
def test_a_share_is_a_percentage_or_a_number(text: str, value: float) -> None:
    assert share(text) == pytest.approx(value)


# The command


def store_of_two_commits(folder: Path, factor: float) -> str:
    """Store two batches at an old commit, and at a new one at `factor` times the speed."""
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ensure_store(uri)
    for name, commit, times in (("old", OLD, 1.0), ("new", NEW, factor)):
        rng = random.Random(0)
        jobs = [
            job("opt-30b", "cpu", "int4", batch, rng, **{"zinfer.commit": commit})
            for batch in (4, 8)
        ]
        for one in jobs:
            for metric in list(one.metrics):
                if metric.startswith("generated_tokens_per_s"):
                    one.metrics[metric] *= times
        parent = FakeRun(name=name, status="ok", tags={"zinfer.role": "sweep"})
        rng = random.Random(name)
        runs = [parent, *jobs]
        write_runs(folder / "mlflow.db", name, runs, children_of_first=True, rng=rng)
    return uri


@pytest.mark.parametrize(
    ("factor", "options", "code"),
    [
        (1.0, (), 0),
        (0.9, (), 1),
        (0.97, ("--fail-if-slower", "5%"), 0),
        (0.9, ("--fail-if-slower", "5%"), 1),
        (1.2, (), 0),
    ],
)
def test_the_exit_code_says_whether_something_got_slower(
    factor: float,
    options: tuple[str, ...],
    code: int,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    uri = store_of_two_commits(tmp_path, factor)
    arguments = ["--uri", uri, "--out", str(tmp_path / "out"), "--no-upload", "--against", OLD[:8]]
    ended = 0
    try:
        main([*arguments, *options])
    except SystemExit as error:
        ended = int(error.code or 0)
    said = capsys.readouterr().out
    assert ended == code, said
    assert "Against commit aaaaaaa" in said
    assert (tmp_path / "out" / "tables" / "against.csv").read_text().count("\n") == 3


def against(folder: Path, name: str) -> tuple[int, Path]:
    """Run the command against `name`; return its exit code, and where it would write."""
    uri, out = store_of_two_commits(folder, 1.0), folder / "out"
    try:
        main(["--uri", uri, "--out", str(out), "--no-upload", "--against", name])
    except SystemExit as error:
        return int(error.code or 0), out
    return 0, out


def test_an_experiment_will_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert against(tmp_path, "old")[0] == 0
    assert "Against experiment old" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["nothing", "123", "f" * 32, "HEAD~1000000"])
def test_what_is_not_there_is_refused_before_a_report_is_written(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = against(tmp_path, name)
    said = capsys.readouterr().err
    assert code == 2 and not out.exists()
    assert f"--against {name} is no " in said and "Traceback" not in said
    assert f"it has runs of {NEW[:7]}, {OLD[:7]}" in said


def test_what_has_no_pair_is_refused_before_a_report_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, out = against(tmp_path, "new")  # the newest sweep against itself
    assert code == 2 and not out.exists()
    assert "nothing in experiment new is paired with" in capsys.readouterr().err


@pytest.fixture(scope="module")
def repository(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a repository of two commits on the branch `old`, one more on `new`."""
    folder = tmp_path_factory.mktemp("repository")
    git(folder, "init", "--quiet", "--initial-branch=old")
    for number in range(3):
        if number == 2:
            git(folder, "checkout", "--quiet", "-b", "new")
        git(folder, "commit", "--quiet", "--allow-empty", "-m", f"commit {number}")
    return folder


def git(folder: Path, *words: str) -> str:
    """Run git without the user's own settings; return what it prints."""
    names = {f"GIT_{role}_{key}": "a@b" for role in ("AUTHOR", "COMMITTER") for key in NAMES}
    return subprocess.run(
        ["git", "-C", str(folder), *words],
        env={**os.environ, **names, "GIT_CONFIG_GLOBAL": os.devnull},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.strip()


@pytest.mark.parametrize("name", ["HEAD", "HEAD~1", "old", "new", "new~2"])
def test_a_commit_may_be_named_as_git_names_it(name: str, repository: Path) -> None:
    assert commit_named(name, repository) == git(repository, "rev-parse", name)


@pytest.mark.parametrize("name", ["missing", "HEAD~9", "--all", ""])
def test_a_name_that_git_does_not_know_is_no_commit(name: str, repository: Path) -> None:
    assert commit_named(name, repository) is None


def test_where_no_repository_is_git_is_not_asked(tmp_path: Path) -> None:
    assert commit_named("HEAD", tmp_path) is None


def test_the_runs_of_a_branch_are_compared_with(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = git(repository, "rev-parse", "old")
    monkeypatch.setattr(command, "CHECKOUT", repository)
    monkeypatch.setattr(sys.modules[__name__], "OLD", commit)
    assert against(tmp_path, "old~0")[0] == 0
    assert f"Against commit {commit[:7]}" in capsys.readouterr().out


def test_a_branch_without_runs_is_refused_with_its_commit(
    repository: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    commit = git(repository, "rev-parse", "new~0")
    monkeypatch.setattr(command, "CHECKOUT", repository)
    code, out = against(tmp_path, "new~0")
    assert code == 2 and not out.exists()
    said = capsys.readouterr().err
    assert f"--against new~0 is commit {commit[:7]}, and no run of zinfer in this store has" in said
