"""profile=true: a trace that Perfetto opens, five operations, and timings left as they are."""

from __future__ import annotations

import gzip
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from multirun_analysis.notes import profile_notes
from tests.helpers.composing import composed
from tests.helpers.running import results
from zinfer.config import config_key
from zinfer.job.files import TRACE_FILE
from zinfer.job.outcome import Outcome
from zinfer.tracking.run import profile_lines
from zinfer.worker.step_profile import most_expensive

TINY = ("model=tiny-llama", "batch.batch_size=2", "batch.prompt_tokens=4", "batch.new_tokens=3",
        "batch.repeats=1", "batch.warmup=0")  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [
        (),
        ("offload=cpu", "launcher.ranks=2"),
        ("engine=resident", "kv_cache=host"),
    ],
    ids=["zero", "two ranks", "cache on the host"],
)
def test_a_decode_step_is_traced_after_the_timing(more: tuple[str, ...], tmp_path: Path) -> None:
    (result,) = results(tmp_path / "sweep", *TINY, *more, "profile=true")
    assert result["status"] == "ok", result["reason"]
    assert result["metrics"]["timed_runs"] == 1
    with gzip.open(Path(result["job_dir"]) / TRACE_FILE, "rt") as file:
        events = json.load(file)["traceEvents"]
    names = {event.get("name") for event in events}
    assert {item["operation"] for item in result["profile"]} <= names
    assert len(result["profile"]) == 5
    shares = [item["share"] for item in result["profile"]]
    assert shares == sorted(shares, reverse=True) and 0 < sum(shares) <= 1
    (logged,) = (tmp_path / "mlartifacts").rglob(TRACE_FILE)
    assert logged.read_bytes() == (Path(result["job_dir"]) / TRACE_FILE).read_bytes()


def test_a_run_with_a_profile_does_not_stand_for_one_without() -> None:
    plain = composed("model=tiny-llama")
    assert plain.profile is False
    assert config_key(replace(plain, profile=True)) != config_key(plain)


def operation(name: str, cpu_us: float, gpu_us: float) -> Any:
    return SimpleNamespace(
        key=name, count=2, self_cpu_time_total=cpu_us, self_device_time_total=gpu_us
    )


AVERAGES = [operation("launch", 90.0, 0.0), operation("gemm", 10.0, 300.0),
            operation("copy", 0.0, 100.0)]  # fmt: skip


@pytest.mark.parametrize(
    ("on_gpu", "first", "share"), [(True, "gemm", 0.75), (False, "launch", 0.9)]
)
def test_the_device_that_computes_ranks_the_operations(
    on_gpu: bool, first: str, share: float
) -> None:
    found = most_expensive(AVERAGES, on_gpu=on_gpu)
    assert (found[0]["operation"], found[0]["share"]) == (first, pytest.approx(share))


def test_a_report_names_the_operations() -> None:
    outcome = Outcome(status="ok", profile=most_expensive(AVERAGES, on_gpu=True))
    run: Any = SimpleNamespace(name="a run", tags={"zinfer.profile": profile_lines(outcome)})
    assert profile_notes([run]) == [
        "a run, most expensive operations of a decode step: gemm 75%, 2 calls; copy 25%, 2 calls; "
        "launch 0%, 2 calls."
    ]
