"""Now against before: paired rows, a ratio with its error, and the exit code."""

from __future__ import annotations

import random
from dataclasses import replace
from pathlib import Path

import pytest

from multirun_analysis.__main__ import main
from multirun_analysis.against import changed_predictions, compare_against
from multirun_analysis.command import share
from multirun_analysis.runs import Run, Selection
from tests.helpers.invented_runs import run
from tests.helpers.synthetic_store import FakeRun, job, write_runs
from zinfer.tracking.store import ensure_store

OLD, NEW = "a" * 40, "b" * 40


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


@pytest.mark.parametrize("name", ["old", "nothing", "123", "f" * 32])
def test_an_experiment_will_do_and_what_is_not_there_is_said(
    name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = store_of_two_commits(tmp_path, 1.0)
    arguments = ["--uri", uri, "--out", str(tmp_path / "out"), "--no-upload", "--against", name]
    if name == "old":
        main(arguments)
        assert "Against experiment old" in capsys.readouterr().out
        return
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "Traceback" not in said and ("no experiment" in said or "no run of zinfer" in said)
