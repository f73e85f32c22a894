"""Jobs are planned before they run; one that cannot be planned costs itself only."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.config import RunConfig
from zinfer.driver.terminal import Terminal
from zinfer.sweep import plan as planning
from zinfer.sweep.plan import plan_job, plan_jobs, planned_apart

FATES = """
import os, sys, time
def fate(name):
    if name == "raises": raise AttributeError("no attribute head_dim")
    if name == "dies": os.kill(os.getpid(), 9)
    if name == "says": print("a library says something")
    if name == "never": time.sleep(600)
import zinfer.sweep.plan as planning
whole = planning._plan_job
def _plan_job(config):
    fate(config.model.name)
    return whole(config)
planning._plan_job = _plan_job
"""
"""Put before the planning process: what foreign code does while a model is counted."""


@pytest.fixture
def misbehaving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let model names decide what becomes of the process that counts them."""
    script = tmp_path / "python"
    program = f"{FATES}\nplanning.main()"
    script.write_text(f"#!/bin/sh\nexec {planning.sys.executable} -c '{program}'\n")
    script.chmod(0o755)
    monkeypatch.setattr(planning.sys, "executable", str(script))


def named(name: str, *overrides: str) -> RunConfig:
    config = composed("model=tiny-llama", "dtype=float32", "hardware.accelerator=cpu", *overrides)
    return config.changed(model={"name": name})


@pytest.mark.usefixtures("misbehaving")
def test_a_model_that_raises_or_kills_costs_itself_only() -> None:
    names = ["says", "raises", "good", "dies", "fine", "dies"]
    plans = planned_apart([named(name) for name in names])
    assert [plan.verdict for plan in plans] == [
        "fits", "unknown", "fits", "unknown", "fits", "unknown",
    ]  # fmt: skip
    assert "AttributeError" in str(plans[1].reason)
    assert "exit code -9" in str(plans[3].reason)


@pytest.mark.usefixtures("misbehaving")
def test_a_model_that_is_never_counted_ends_the_counting_not_the_sweep() -> None:
    plans = planned_apart([named("good"), named("never"), named("fine")], timeout_s=12.0)
    assert [plan.verdict for plan in plans] == ["fits", "unknown", "unknown"]
    assert all("took more than" in str(plan.reason) for plan in plans[1:])


def test_what_cannot_be_planned_is_refused_or_unknown_with_its_reason(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fail(config: RunConfig) -> None:
        raise KeyError("rope_theta")

    monkeypatch.setattr(planning, "_plan_job", fail)
    plan = plan_job(named("tiny-llama"))
    assert (plan.verdict, plan.reason) == ("unknown", "KeyError: 'rope_theta'")


def test_jobs_of_known_models_are_planned_here_in_their_order() -> None:
    configs = [named("tiny-llama", f"batch.batch_size={rows}") for rows in (1, 1_000_000)]
    plans = plan_jobs(configs, Terminal("text", err=io.StringIO()))
    assert [plan.verdict for plan in plans] == ["fits", "does_not_fit"]
    assert plans[1].needed_bytes["host"] > 100 * plans[0].needed_bytes["host"] / 2
