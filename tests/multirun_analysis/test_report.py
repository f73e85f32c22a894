"""The report end to end, out of a store or job folders; and a sentence for each bad input."""

from __future__ import annotations

import csv
import json
import random
import subprocess
import sys
from pathlib import Path

import pytest

from multirun_analysis.__main__ import main
from multirun_analysis.folders import read_folder
from multirun_analysis.formats import to_csv, to_markdown
from multirun_analysis.latex import to_latex
from multirun_analysis.report import Report, write_report
from multirun_analysis.runs import ReportError
from multirun_analysis.store import read_mlflow
from multirun_analysis.table import Cell, Column, Table
from tests.helpers.synthetic_store import FakeRun, job, make_store, write_runs
from zinfer.tracking.store import ensure_store


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> str:
    return make_store(tmp_path_factory.mktemp("store"), runs=200)


@pytest.fixture(scope="module")
def written(store: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Report, Path]:
    out = tmp_path_factory.mktemp("report")
    return write_report(read_mlflow(store), out), out


def empty_store(folder: Path) -> str:
    uri = f"sqlite:///{folder / 'mlflow.db'}"
    ensure_store(uri)
    return uri


# Reading


def test_the_newest_sweep_is_read_and_what_is_odd_is_said(store: str) -> None:
    selection = read_mlflow(store)
    assert selection.title.startswith("sweep model=opt-30b")
    assert len(selection.runs) == 200 + 5  # all but the run of another tool and the grid of plans
    said = " ".join(selection.notes)
    for part in (
        "1 run of another tool in the same place left out (no zinfer.status tag): resnet-50",
        "1 grid of plans left out, nothing was measured",
        "1 run measured with method version 0, today's is 1",
        "1 run ended well but logged no generated_tokens_per_s",
        "1 run had not ended",
    ):
        assert part in said


def test_experiment_parent_run_and_filter_choose_runs(store: str) -> None:
    everything = read_mlflow(store, experiment="zinfer")
    assert len(everything.runs) == 205
    parent = everything.runs[0].tags["mlflow.parentRunId"]
    assert len(read_mlflow(store, run_id=parent).runs) == 205
    filtered = read_mlflow(
        store, where="params.`offload.device` = 'nvme' and metrics.generated_tokens_per_s > 0"
    )
    assert filtered.runs and {run.params["offload.device"] for run in filtered.runs} == {"nvme"}
    single = read_mlflow(store, run_id=everything.runs[-1].run_id)
    assert [run.run_id for run in single.runs] == [everything.runs[-1].run_id]


def test_failed_runs_keep_their_status_and_reason(store: str) -> None:
    refused = [run for run in read_mlflow(store).runs if run.status == "does_not_fit"]
    assert refused and all(run.reason and "GiB" in run.reason for run in refused)


def test_job_folders_are_read_without_a_store(tmp_path: Path) -> None:
    job_dir = tmp_path / "2026" / "0"
    job_dir.mkdir(parents=True)
    config = {
        "task": "run",
        "weights": "dummy",
        "model": {"name": "tiny-opt"},
        "offload": {"device": "cpu", "use_gds": False},
    }
    config |= {
        "dtype": {"weights": "float32"},
        "batch": {"batch_size": 2, "prompt_tokens": 8, "new_tokens": 4},
    }
    (job_dir / "job.json").write_text(json.dumps({"config": config}))
    metrics = {
        "generated_tokens_per_s": 5.0,
        "generated_tokens_per_s_stddev": 0.1,
        "decode_step_s": 0.1,
        "timed_runs": 3,
    }
    (job_dir / "result.json").write_text(
        json.dumps(
            {"status": "ok", "run_id": None, "metrics": metrics, "model": {"dtype": "float32"}}
        )
    )
    sample = {"event": "sample", "kind": "timed", "decode_step_s": [0.1, 0.2, 0.3]}
    (job_dir / "events.jsonl").write_text(json.dumps(sample) + "\n" + json.dumps(sample) + "\n")
    refused = tmp_path / "2026" / "1"
    (refused / ".hydra").mkdir(parents=True)
    (refused / ".hydra" / "config.yaml").write_text(
        "model: {name: tiny-opt}\noffload: {device: nvme}\n"
    )
    (refused / "result.json").write_text(
        json.dumps({"status": "refused", "problems": ["no disk. Set offload=cpu"]})
    )
    (tmp_path / "half").mkdir()
    (tmp_path / "half" / "result.json").write_text('{"status": "o')
    selection = read_folder(tmp_path)
    by_status = {run.status: run for run in selection.runs}
    assert by_status["ok"].params["offload.use_gds"] == "false"  # as MLflow has it
    assert by_status["refused"].reason == "no disk. Set offload=cpu"
    assert by_status["refused"].params["offload.device"] == "nvme"
    assert "1 job folder left out, result.json cannot be read" in " ".join(selection.notes)
    assert selection.history(by_status["ok"], "decode_step_s_by_step") == (
        (0, 0.1),
        (1, 0.2),
        (2, 0.3),
    )
    report = write_report(selection, tmp_path / "out")
    assert [best.configuration.model for best in report.best] == ["tiny-opt"]


# Writing


def test_one_folder_holds_everything(written: tuple[Report, Path]) -> None:
    report, out = written
    assert {path.name for path in out.iterdir()} == {
        "report.html",
        "report.md",
        "tables",
        "figures",
        "data",
    }
    for name in ("runs", "best", "failures", "speedup", "published", "memory"):
        assert {path.suffix for path in (out / "tables").glob(f"{name}.*")} == {
            ".csv",
            ".md",
            ".tex",
        }, name
    drawn = {figure.name for figure in report.figures if figure.panels}
    assert drawn == {
        "throughput", "tradeoff", "pareto", "ceiling", "time", "memory", "speedup", "latency",
    }  # fmt: skip
    for figure in report.figures:
        assert figure.caption and "NVIDIA RTX A6000" in figure.caption, figure.name
        for panel in figure.panels:
            assert (out / "figures" / f"{panel.name}.svg").stat().st_size > 1000
            assert (out / "figures" / f"{panel.name}.png").read_bytes()[:4] == b"\x89PNG"
    assert any("No run logged quality_perplexity" in sentence for sentence in report.not_drawn)
    assert "No run logged quality_perplexity" in (out / "report.md").read_text()


def test_no_run_is_dropped(written: tuple[Report, Path]) -> None:
    report, out = written
    with (out / "tables" / "runs.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert sum(len(row["run_ids"].split()) for row in rows) == 204
    with (out / "tables" / "plans.csv").open() as file:
        assert len(list(csv.DictReader(file))) == 1
    assert sum(count for _, _, count in report.counts) == 205
    failed = [row for row in rows if row["status"] not in ("measured", "planned only")]
    assert failed and all(row["reason"] or row["status"] == "not ended" for row in failed)


def test_the_report_is_one_file_that_asks_for_nothing(written: tuple[Report, Path]) -> None:
    import re

    _, out = written
    page = (out / "report.html").read_text()
    assert not re.search(r"""<(?:script|img|iframe|link)[^>]+(?:src|href)=["'](?!data:)""", page)
    assert "@import" not in page and not re.search(r"url\((?!#)", page)


def test_markdown_and_html_show_the_same_best(written: tuple[Report, Path]) -> None:
    report, out = written
    for best in report.best:
        assert best.label in (out / "report.md").read_text()
        assert best.label in (out / "report.html").read_text()


def test_names_from_a_store_cannot_become_markup(tmp_path: Path) -> None:
    uri, rng = empty_store(tmp_path), random.Random(0)
    evil = job("opt-30b", "cpu", "bfloat16", 8, rng)
    evil.params["model.name"] = "<script>alert(1)</script>$x_$"
    write_runs(
        tmp_path / "mlflow.db", "zinfer", [evil, job("opt-30b", "cpu", "bfloat16", 4, rng)], rng=rng
    )
    write_report(read_mlflow(uri), tmp_path / "out")
    assert "<script>alert" not in (tmp_path / "out" / "report.html").read_text()
    assert r"\$x\_\allowbreak{}\$" in (tmp_path / "out" / "tables" / "best.tex").read_text()


def test_tables_become_csv_markdown_and_booktabs() -> None:
    columns = (
        Column(key="model.name", head="model"),
        Column(key="rate_per_s", head="tokens/s", number=True),
        Column(key="sd", head="", csv_only=True),
    )
    rows = (
        (
            Cell(text="a|b_1", value="a|b_1", url="http://host/1"),
            Cell(text="4.2 ± 0.1", value=4.21),
            Cell(text="", value=0.1),
        ),
    )
    table = Table(name="runs", title="Runs", note="100%", columns=columns, rows=rows)
    assert to_csv(table) == "model.name,rate_per_s,sd\na|b_1,4.21,0.1\n"
    assert to_markdown(table).splitlines() == [
        "| model                   |  tokens/s |",
        "| ----------------------- | --------: |",
        r"| [a\|b_1](http://host/1) | 4.2 ± 0.1 |",
    ]
    latex = to_latex(table)
    for part in (
        r"\begin{tabular}{lr@{}l}",
        r"\toprule",
        r"a\textbar{}b\_\allowbreak{}1 & 4&.2 $\pm$ 0.1 \\",
        r"\caption{Runs. 100\%}",
        r"\bottomrule",
    ):
        assert part in latex


# Bad input: a sentence, exit code 2, never a traceback


def refused(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert "Traceback" not in said and said.count("\n") == 1
    return said


def test_no_store_says_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "there is no run store at" in refused([], capsys)
    assert not (tmp_path / "mlflow.db").exists()


def test_an_empty_store_and_an_empty_experiment_are_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = empty_store(tmp_path)
    assert refused(["--uri", uri], capsys).startswith(
        "zinfer-report: no run of zinfer is in sqlite:///"
    )
    write_runs(tmp_path / "mlflow.db", "empty", [], rng=random.Random(0))
    assert "experiment empty" in refused(["--uri", uri, "--experiment", "empty"], capsys)
    assert "Its experiments: Default, empty" in refused(
        ["--uri", uri, "--experiment", "zinfr"], capsys
    )


def test_an_experiment_of_another_tool_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    uri = empty_store(tmp_path)
    write_runs(
        tmp_path / "mlflow.db",
        "vision",
        [FakeRun(name="resnet-50", status="ok", params={"lr": "0.1"})],
        rng=random.Random(0),
    )
    assert "1 run of another tool" in refused(["--uri", uri, "--experiment", "vision"], capsys)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--filter", "params.offload.device is nvme"], "MLflow does not take this filter"),
        (["--run", "0" * 32], "there is no run 000"),
        (["--baseline", "offload"], "is no choice"),
        (["--uri", "mlflow.db"], "is no URI of a run store. Set --uri sqlite:///mlflow.db"),
        (["--from-dir", "absent"], "absent is not a folder"),
        (["--from-dir", "absent", "--filter", "x"], "--from-dir reads job folders"),
        (["--uri", "http://127.0.0.1:9"], "does not answer"),
    ],
)
def test_what_cannot_be_read_is_said_in_one_sentence(
    arguments: list[str],
    said: str,
    store: str,
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    uri = [] if "--uri" in arguments or "--from-dir" in arguments else ["--uri", store]
    assert said in refused([*arguments, *uri], capsys)


def test_a_file_that_is_no_store_is_said(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "mlflow.db").write_text("not a database")
    assert "is not a run store of MLflow" in refused(
        ["--uri", f"sqlite:///{tmp_path / 'mlflow.db'}"], capsys
    )
    with pytest.raises(ReportError, match="no job folder"):
        read_folder(tmp_path)


def test_a_sweep_in_which_everything_failed_is_still_a_report(tmp_path: Path) -> None:
    uri, rng = empty_store(tmp_path), random.Random(0)
    failed = job("bloom-176b", "none", "bfloat16", 1, rng)
    write_runs(tmp_path / "mlflow.db", "zinfer", [failed], rng=rng)
    report = write_report(read_mlflow(uri), tmp_path / "out")
    assert report.best == ()
    assert report.figures == ()
    assert "No run here measured a speed" in (tmp_path / "out" / "report.html").read_text()
    assert "needs" in (tmp_path / "out" / "tables" / "failures.md").read_text()


# Size

MEASURED_REPORT = """
import sys
from multirun_analysis.__main__ import main
main(sys.argv[1:])
status = open("/proc/self/status").read()
print(int(status.partition("VmHWM:")[2].split()[0]) * 1024)
"""
"""ru_maxrss would be that of the process that started this one, where that was larger."""


@pytest.mark.slow
def test_a_thousand_runs_take_a_gigabyte_at_most(tmp_path: Path) -> None:
    """How fast: bench/bench_report.py."""
    uri, out = make_store(tmp_path, runs=1000), tmp_path / "report"
    command = [sys.executable, "-c", MEASURED_REPORT, "--uri", uri, "--out", str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert (out / "report.html").stat().st_size <= 8e6
    assert int(done.stdout.splitlines()[-1]) <= 1e9
