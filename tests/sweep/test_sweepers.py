"""A sweeper that searches is told one metric of each job, and the best job is said."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from zinfer.config import ConfigError
from zinfer.sweep.record import Sweep
from zinfer.sweep.sweepers import best_line, direction_of, objective_of, require_sweeper, trials_of

RATE = "generated_tokens_per_s"
BASIC = "hydra._internal.core_plugins.basic_sweeper.BasicSweeper"


def master(objective: str = RATE, **sweeper: Any) -> Any:
    return OmegaConf.create(
        {"hydra": {"sweeper": {"_target_": BASIC, **sweeper}}, "sweep": {"objective": objective}}
    )


def sweep(**changes: Any) -> Sweep:
    values: dict[str, Any] = {
        "folder": Path("/s"), "attempt": "a", "command": "zinfer", "output_format": "text",
        "tracking_uri": None, "experiment": "", "resumes": False, "retry": "failed",
        "fail_fast": False, "preview": False, "local": True, "in_process": True, "forked": False,
        "started_s": 0.0, "pid": 1, "jobs": None, "fixed": ["model"], "direction": "maximize",
    }  # fmt: skip
    return Sweep(**{**values, **changes})


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        ({"status": "ok", "metrics": {RATE: 4.0}}, 4.0),
        ({"status": "ok", "metrics": {}}, None),
        ({"status": "killed", "metrics": {RATE: 4.0}}, None),
        ({"status": "refused"}, None),
        (None, None),
    ],
)
def test_only_a_job_that_ended_well_has_an_objective(
    document: dict[str, Any] | None, expected: float | None
) -> None:
    assert objective_of(document, RATE) == expected


@pytest.mark.parametrize(
    ("direction", "said"), [("maximize", "job 2 with 8: batch=4"), ("minimize", "job 0 with 2: ")]
)
def test_the_best_job_is_said_by_what_tells_it_from_the_others(direction: str, said: str) -> None:
    rows = [
        (num, ["model=m", f"batch={num + 2}"], document)
        for num, document in enumerate(
            [
                {"status": "ok", "metrics": {RATE: 2.0}},
                {"status": "killed", "metrics": {RATE: 99.0}},
                {"status": "ok", "metrics": {RATE: 8.0}},
            ]
        )
    ]
    line = best_line(sweep(direction=direction), rows)
    assert line.startswith(f"best of 2 jobs with {RATE} (1 without): {said}")
    assert "none is best" in best_line(sweep(), rows[1:2])


@pytest.mark.parametrize(
    ("sweeper", "expected"),
    [
        ({}, None),
        ({"direction": "maximize"}, "maximize"),
        ({"optuna_config": {"direction": "maximize"}}, "maximize"),
    ],
)
def test_the_direction_is_the_sweeper_s(sweeper: dict[str, Any], expected: str | None) -> None:
    assert direction_of(master(**sweeper)) == expected


@pytest.mark.parametrize(
    ("sweeper", "said"),
    [
        ({"direction": "minimize"}, "Set hydra.sweeper.direction=maximize"),
        ({"direction": ["maximize", "minimize"]}, "a job has one sweep.objective"),
        ({"_target_": "hydra_plugins.hydra_optuna_sweeper.optuna_sweeper.X"}, "zinfer[search]"),
    ],
)
def test_a_search_that_cannot_be_meant_is_refused(
    sweeper: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinfer.sweep.sweepers._is_there", lambda package: False)
    with pytest.raises(ConfigError) as refused:
        require_sweeper(master(**sweeper))
    assert said in refused.value.problems[0]


def test_less_of_another_metric_may_be_looked_for() -> None:
    assert require_sweeper(master("peak_host_rss_bytes", direction="minimize")) is None


@pytest.mark.parametrize(
    ("settings", "trials"),
    [
        ({"n_trials": 20}, 20),
        ({"optuna_config": {"n_trials": 7}}, 7),
        ({"n_trials": None}, None),
        ({"n_trials": "many"}, None),
        ({}, None),
    ],
)
def test_the_number_of_trials_is_what_the_sweeper_says(
    settings: dict[str, Any], trials: int | None
) -> None:
    assert trials_of(master(**settings)) == trials
