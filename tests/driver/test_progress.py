"""The events of real jobs, turned into the lines that people see at any moment of them.

tests/data/events holds the logs of two jobs that ran on two busy cores; their times count from the
first event, and warnings, results and token ids are left out of them.
"""

from __future__ import annotations

import io
import json
from pathlib import Path

import pytest
from rich.console import Console

from tests.helpers.composing import composed
from zinfer.driver.frames import JobFrame, JobsFrame, cut
from zinfer.driver.label import job_label
from zinfer.driver.progress import START, JobProgress, coming_phases, phase_line
from zinfer.driver.screen import Screen
from zinfer.driver.terminal import Terminal

LOGS = Path(__file__).parents[1] / "data" / "events"
START_S = 1e9
DUMMY, PRETRAINED = "opt-350m-dummy", "smollm2-135m-pretrained"
COMING = (
    START, "plan", "import", "load", "verify", "warm-up", "generate", "quality", "log",
)  # fmt: skip


def progress_at(log: str, seconds: float) -> JobProgress:
    """Follow a job of the recorded ones until this moment."""
    progress = JobProgress("opt-350m offload=cpu", COMING)
    for text in (LOGS / f"{log}.jsonl").read_text().splitlines():
        event = json.loads(text)
        if event["time_s"] <= START_S + seconds:
            progress.take(event)
    return progress


def drawn(frame: JobFrame | JobsFrame, width: int) -> list[str]:
    """Return the lines of a frame on a terminal of this width."""
    console = Console(record=True, width=width, file=io.StringIO(), color_system=None)
    console.print(frame)
    return [line.rstrip() for line in console.export_text().splitlines()]


@pytest.mark.parametrize(
    ("log", "seconds", "width", "line"),
    [
        (DUMMY, 5, 100, "  import          5 s"),
        (DUMMY, 15, 100, "  load weights     0 s  1.2 GiB"),
        (DUMMY, 18, 100,
         "  load weights     3 s  ####................  20% 258.3 MiB of 1.2 GiB  "
         "about 10 seconds left"),
        (DUMMY, 18, 60, "  load weights     3 s   20%  about 10 seconds left"),
        (DUMMY, 18, 40, "  load weights     3 s   20%  10 seconds"),
        (DUMMY, 18, 28, "  load weights     3 s   20%"),
        (DUMMY, 32, 100, "  warm up          9 s  ########............  44% 7 of 16 tokens  "
         "about 10 seconds left"),
        (DUMMY, 60, 80, "  generate        17 s   19% 6 of 32 tokens  about 25 seconds left"),
        (DUMMY, 80, 80, "  generate        37 s   59% 19 of 32 tokens  about 15 seconds left"),
        (PRETRAINED, 25, 80,
         "  load weights    10 s   25% 69 of 272 tensors  about 30 seconds left"),
        (PRETRAINED, 34, 80,
         "  verify weights   3 s   43% 58 of 135 million weights  a few seconds left"),
        (PRETRAINED, 300, 60, "  score the text   89 s   48%  about 1 minute left"),
    ],
)  # fmt: skip
def test_a_phase_says_its_share_and_its_time_left(
    log: str, seconds: float, width: int, line: str
) -> None:
    progress = progress_at(log, seconds)
    assert progress.current is not None
    found = drawn(JobFrame(progress, START_S + seconds), width)
    assert [each for each in found if each.startswith(line[:10])] == [line]
    assert max(map(len, found)) <= width


def test_phases_that_are_over_and_to_come_are_shown_too() -> None:
    lines = drawn(JobFrame(progress_at(DUMMY, 32), START_S + 32, head="1 of 3 jobs done"), 100)
    assert lines[:2] == ["1 of 3 jobs done", "opt-350m offload=cpu"]
    assert [line.split("  ")[1] for line in lines[2:]] == [
        "plan", "import", "load weights", "warm up", "generate", "score the text", "log to MLflow",
    ]  # fmt: skip


def test_jobs_side_by_side_have_a_line_each_and_their_labels_give_way() -> None:
    jobs = (progress_at(DUMMY, 18), progress_at(PRETRAINED, 25))
    jobs[1].label = "smollm2-135m " + "batch.batch_size=8 " * 4
    for width in (40, 60, 120):
        lines = drawn(JobsFrame(jobs, START_S + 25, head="0 of 2 jobs done"), width)
        assert len(lines) == 3 and max(map(len, lines)) <= width
        assert all("load weights" in line for line in lines[1:])
    assert "about 30 seconds left" in lines[2]
    assert cut("batch.batch_size=8", 10) == "batch.bat…"


@pytest.mark.parametrize(
    ("log", "seconds", "line"),
    [
        (DUMMY, 0, "opt: plan"),
        (DUMMY, 15, "opt: load weights, 1.2 GiB"),
        (DUMMY, 18, "opt: load weights, 20% (258.3 MiB of 1.2 GiB) after a few seconds, "
         "about 10 seconds left"),
        (DUMMY, 23.1, "opt: warm up, 1 generation of 16 tokens"),
        (DUMMY, 43, "opt: generate, 2 generations of 16 tokens, about 40 seconds left"),
        (PRETRAINED, 300, "opt: score the text, 48% (62 of 128 tokens) after 1 minute, "
         "about 1 minute left"),
    ],
)  # fmt: skip
def test_a_log_says_the_same_in_one_line(log: str, seconds: float, line: str) -> None:
    progress, now_s = progress_at(log, seconds), START_S + seconds
    assert progress.current is not None
    assert phase_line("opt", progress.current, now_s, progress.seconds_left(now_s)) == line


@pytest.mark.parametrize("log", [DUMMY, PRETRAINED])
def test_a_pipe_gets_at_most_one_line_for_each_phase(log: str) -> None:
    err = io.StringIO()
    terminal = Terminal("text", name="opt", err=err)
    terminal.begin(COMING, logs_phases=True)
    names = []
    for text in (LOGS / f"{log}.jsonl").read_text().splitlines():
        event = json.loads(text)
        names += [event["name"]] if event["event"] == "phase" else []
        terminal.event(event)
        terminal.tick()
    lines = err.getvalue().splitlines()
    assert len(lines) == len(names) and "\r" not in err.getvalue()
    assert Screen.current is None


def test_with_json_a_pipe_gets_no_line_of_progress() -> None:
    err = io.StringIO()
    terminal = Terminal("json", name="opt", err=err)
    terminal.begin(COMING, logs_phases=True)
    for text in (LOGS / f"{DUMMY}.jsonl").read_text().splitlines():
        terminal.event(json.loads(text))
    assert err.getvalue() == ""


def test_a_prediction_tells_the_time_before_the_first_generation() -> None:
    progress = JobProgress()
    prediction = {"predicted_prefill_s": 10.0, "predicted_decode_step_s": 2.0}
    events = (
        {"event": "planned", "plan": {"prediction": prediction}},
        {"event": "phase", "name": "generate", "generations": 3, "new_tokens": 16},
    )
    for event in events:
        progress.take({**event, "time_s": START_S})
    assert progress.seconds_left(START_S) == 3 * (10 + 15 * 2)
    assert progress.seconds_left(START_S + 50) == 3 * (10 + 15 * 2) - 50


def test_nothing_in_a_foreign_event_ends_the_progress() -> None:
    progress = JobProgress()
    for event in (
        {"event": "planned", "plan": {"prediction": "none"}},
        {"event": "phase", "name": "generate", "generations": "many", "new_tokens": None},
        {"event": "progress", "done": 3, "total": 0, "unit": "tokens"},
        {"event": "something new"},
    ):
        progress.take({**event, "time_s": START_S})
    assert progress.seconds_left(START_S + 9) is None
    assert drawn(JobFrame(progress, START_S + 9), 40)[-1] == "  generate  9 s"


@pytest.mark.parametrize(
    ("settings", "task", "label"),
    [
        ([], "run", "opt-125m"),
        (["model=opt-125m", "offload=cpu"], "run", "opt-125m offload=cpu"),
        (["tracking.uri=http://me:secret@host", "format=json"], "run", "opt-125m"),
        (["+batch.x=1", "hydra.run.dir=/tmp/a", "task=plan"], "plan", "plan opt-125m +batch.x=1"),
        (["++hardware.x=[True,1]"], "run", "opt-125m hardware.x=[true,1]"),
        (
            ["profile=True", "batch.prompt_text='True story'"],
            "run",
            "opt-125m profile=true batch.prompt_text='True story'",
        ),
        (["sweep.resume=false", "batch.batch_size=8"], "run", "opt-125m batch.batch_size=8"),
        (
            ["model.source=https://me:pass@host/x"],
            "run",
            "opt-125m model.source=https://***@host/x",
        ),
    ],
)
def test_a_label_is_the_model_and_the_settings_that_differ(
    settings: list[str], task: str, label: str
) -> None:
    assert job_label("opt-125m", settings, task) == label


@pytest.mark.parametrize(
    ("overrides", "phases"),
    [
        (["tracking=none"], "start plan import load warm-up generate"),
        (["tracking=none", "task=plan"], "start plan"),
        (["tracking=sqlite", "batch.warmup=0", "profile=true"],
         "start plan import load generate profile log"),
    ],
)  # fmt: skip
def test_the_phases_of_a_job_follow_from_its_configuration(
    overrides: list[str], phases: str
) -> None:
    assert " ".join(coming_phases(composed(*overrides))) == phases
