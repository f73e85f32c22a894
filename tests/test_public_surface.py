"""Freeze what users' scripts rely on: tests/data/public_surface.json lists it.

After a wanted change run `python -m tests.test_public_surface write` and say it in CHANGELOG.md.
"""

from __future__ import annotations

import json
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import yaml

import zinfer
from multirun_analysis.__main__ import parser
from tests.helpers.composing import CONF, choices, composed
from tests.helpers.planning import planned, profile
from tests.helpers.sweeping import TINY, document, job_runs, run
from zinfer.config.engines import ENGINES
from zinfer.config.tasks import TASKS
from zinfer.job.outcome import EXIT_CODES, INTERRUPTED, EndedBy, Outcome
from zinfer.job.quality import QUALITY_METRICS
from zinfer.plan.scores import scored
from zinfer.plan.tiers import TIERS
from zinfer.tracking.names import (
    COMPARED_METRICS,
    MODEL_NUMBERS,
    PLAN_FITS,
    REPEAT_METRIC,
    STEP_METRIC,
)
from zinfer.tracking.run import run_params
from zinfer.worker.metrics import Metrics

ROOT = Path(__file__).parents[1]
FROZEN = ROOT / "tests" / "data" / "public_surface.json"


SOMETIMES = {
    "zinfer.binding_resource",
    "zinfer.profile",
    "zinfer.reason",
    "zinfer.stability_reason",
    "zinfer.warnings",
    "zinfer.weights_sha256",
    "zinfer.quality",
    "zinfer.quality_reason",
}
"""Tags that a run has or has not, by what happened to it."""


def settings(tree: Mapping[str, Any], prefix: str = "") -> Iterator[str]:
    """Return the dotted names of all settings in a tree of YAML."""
    for name, value in tree.items():
        if name in ("defaults", "hydra"):
            continue
        if isinstance(value, Mapping) and value:
            yield from settings(value, f"{prefix}{name}.")
        else:
            yield prefix + name


def overrides() -> list[str]:
    """Return all settings of the command line, of conf/config.yaml and every group."""
    names = set(settings(yaml.safe_load((CONF / "config.yaml").read_text())))
    for group in groups():
        for choice in choices(group):
            tree = yaml.safe_load((CONF / group / f"{choice}.yaml").read_text()) or {}
            names |= set() if group == "experiment" else set(settings(tree, f"{group}."))
    return sorted(name for name in names if not name.startswith("model.overrides."))


def groups() -> list[str]:
    """Return the names of the config groups, Hydra's own left out."""
    return sorted(path.name for path in CONF.iterdir() if path.is_dir() and path.name != "hydra")


def number_names() -> list[str]:
    """Return a run's numbers that code names: those measured, planned, predicted and scored."""
    measured = {field.name: 1.0 for field in fields(Metrics)}
    here = planned("model=tiny-opt", "offload=none", profile=profile())
    box = planned("model=tiny-opt", "offload=cpu", "hardware=a6000", "dtype=float16")
    scores = {
        name
        for made in (here, box)
        for name in scored(measured, replace(made.prediction, yardstick_s=0.01), made.plan)
    }
    tiers = {f"plan_{tier}_{what}_bytes" for tier in TIERS for what in ("needed", "available")}
    quality = set(QUALITY_METRICS)
    return sorted(measured.keys() | quality | scores | MODEL_NUMBERS.keys() | tiers | {PLAN_FITS})


def named_in_code() -> dict[str, Any]:
    """Collect the surface that can be read without running a job."""
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    options = [option for action in parser()._actions for option in action.option_strings]
    return {
        "commands": sorted(scripts),
        "exit_codes": {**EXIT_CODES, "interrupted": INTERRUPTED, "other": 1},
        "ended_by": sorted(EndedBy),
        "tasks": sorted(TASKS),
        "engines": sorted(ENGINES),
        "python": sorted(getattr(zinfer, "__all__", [])),
        "groups": {
            group: choices(group) for group in groups() if group not in ("model", "hardware")
        },
        "overrides": overrides(),
        "report_options": sorted(options),
        "json": sorted(Outcome(status="error").document()),
        "json_of_refusals": sorted(Outcome(status="refused").document()),
        "params": sorted(run_params(composed("model=tiny-opt", "offload=nvme", "dtype=int8"))),
        "metrics": sorted({*COMPARED_METRICS, REPEAT_METRIC, STEP_METRIC}),
        "numbers": number_names(),
    }


def seen_in_runs(folder: Path) -> tuple[dict[str, Any], set[str]]:
    """Run a sweep of one measured and one refused job; collect its names, metrics apart."""
    done = run(folder, "-m", *TINY, "offload=nvme", "batch.repeats=2,0", "format=json")
    sweep = document(done)
    job = next(job for job in sweep["jobs"] if job["status"] == "ok")
    (logged,) = [found for found in job_runs(folder) if found["zinfer.status"] == "ok"]
    tags = {name for name in logged if name.startswith(("zinfer.", "mlflow."))}
    return {
        "json_of_sweeps": sorted(sweep),
        "json_of_sweeps.jobs": sorted({key for job in sweep["jobs"] for key in job}),
        "tags": sorted(tags | SOMETIMES),
    }, set(job["metrics"])


def frozen() -> dict[str, Any]:
    found = json.loads(FROZEN.read_text())
    assert isinstance(found, dict)
    return found


@pytest.mark.parametrize("part", sorted(json.loads(FROZEN.read_text())) if FROZEN.exists() else [])
def test_names_that_scripts_rely_on_are_the_frozen_ones(part: str) -> None:
    here = named_in_code()
    if part in here:
        assert here[part] == frozen()[part], (
            f"{part} changed. If it is wanted: python -m tests.test_public_surface write, "
            "and a line in CHANGELOG.md"
        )


def test_every_part_of_the_surface_is_frozen() -> None:
    assert named_in_code().keys() <= frozen().keys()


@pytest.mark.slow
def test_a_run_logs_and_prints_the_frozen_names(tmp_path: Path, built_ops: list[str]) -> None:
    seen, metrics = seen_in_runs(tmp_path)
    assert {part: frozen()[part] for part in seen} == seen
    assert metrics <= set(frozen()["numbers"])


if __name__ == "__main__" and sys.argv[1:] == ["write"]:
    import tempfile

    with tempfile.TemporaryDirectory() as new:
        surface = named_in_code() | seen_in_runs(Path(new))[0]
    FROZEN.write_text(json.dumps(surface, indent=1, sort_keys=True) + "\n")
    print(f"wrote {FROZEN}")
