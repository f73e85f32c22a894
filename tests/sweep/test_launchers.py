"""The same sweep under every launcher of Hydra: a killed worker costs its own job only."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.helpers.composing import CONF
from tests.helpers.sweeping import (
    TINY,
    document,
    events_of,
    job_runs,
    nothing_is_left,
    run,
    start,
    statuses,
    text_of,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate
from zinfer.config import ConfigError
from zinfer.sweep import launchers

SEEDS = f"batch.seed=1,{fate.KILLED},2"


def installed(module: str) -> bool:
    return (
        importlib.util.find_spec("hydra_plugins") is not None
        and importlib.util.find_spec(f"hydra_plugins.{module}") is not None
    )


needs_joblib = pytest.mark.skipif(
    not installed("hydra_joblib_launcher"), reason="needs pip install 'zinfer[launchers]'"
)
needs_submitit = pytest.mark.skipif(
    not installed("hydra_submitit_launcher"), reason="needs pip install 'zinfer[launchers]'"
)


needs_ray = pytest.mark.skipif(
    not installed("hydra_ray_launcher"), reason="needs pip install 'zinfer[ray]'"
)
RAY = ("hydra/launcher=ray", "+hydra.launcher.ray.init.num_cpus=2")


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("hydra/launcher=local_processes",), marks=needs_joblib, id="joblib"),
        pytest.param(("hydra/launcher=submitit_local",), marks=needs_submitit, id="submitit_local"),
        pytest.param(RAY, marks=needs_ray, id="ray"),
    ],
)
def test_a_killed_worker_costs_its_own_job(launcher: tuple[str, ...], tmp_path: Path) -> None:
    sweep = ("-m", *launcher, *TINY, SEEDS, "format=json")
    done = run(tmp_path, *sweep, misbehaving=True)
    assert statuses(done) == ["ok", "killed", "ok"], done.stderr
    assert done.returncode == 1
    nothing_is_left(tmp_path)
    again = run(tmp_path, *sweep)
    assert [(job["status"], job.get("reused", False)) for job in document(again)["jobs"]] == [
        ("ok", True),
        ("ok", False),
        ("ok", True),
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("hydra/launcher=local_processes",), marks=needs_joblib, id="joblib"),
        pytest.param(RAY, marks=needs_ray, id="ray"),
    ],
)
def test_jobs_in_other_processes_end_with_an_interrupted_sweep(
    launcher: tuple[str, ...], tmp_path: Path
) -> None:
    process = start(
        tmp_path,
        "-m",
        *launcher,
        *TINY,
        f"batch.seed={fate.SLEEP},{fate.HANG},1",
        misbehaving=True,
    )
    wait_until(lambda: len(events_of(tmp_path, "sample")) == 2, 120, "sample of two jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(120) == 130
    nothing_is_left(tmp_path)
    assert {logged["zinfer.status"] for logged in job_runs(tmp_path)} == {"killed"}


@pytest.mark.parametrize("preset", ["slurm_gpu", "slurm_cpu", "local_processes"])
def test_presets_compose_without_their_plugins(preset: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose(
            "config", overrides=[f"hydra/launcher={preset}"], return_hydra_config=True
        ).hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.")


@pytest.mark.slow
@needs_submitit
def test_a_job_whose_driver_is_killed_costs_itself_under_submitit(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "-m",
        "hydra/launcher=submitit_local",
        *TINY,
        f"batch.seed={fate.SLEEP},1",
        "hydra.sweep.dir=S",
        misbehaving=True,
    )
    job = tmp_path / "S" / "0"
    events = job / "events.jsonl"
    wait_until(lambda: '"sample"' in text_of(events), 120, "sample of job 0")
    driver = json.loads((job / "job.json").read_text())["driver_pid"]
    os.kill(driver, signal.SIGKILL)
    assert process.wait(180) == 1
    assert "stopped: " in (tmp_path / "stderr").read_text()
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    nothing_is_left(tmp_path)
    found = {logged["zinfer.status"]: logged for logged in job_runs(tmp_path)}
    assert set(found) == {"killed", "ok"}
    assert "the driver was killed" in found["killed"]["zinfer.reason"]


def test_slurm_is_refused_where_there_is_no_sbatch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launchers, "require_installed", lambda launcher: None)
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(ConfigError) as refused:
        launchers.require_launcher(launchers.SLURM_LAUNCHER)
    assert "sbatch, which is not on PATH" in refused.value.problems[0]


@pytest.mark.skipif(
    installed("hydra_submitit_launcher"),
    reason="needs an environment without zinfer[launchers]: make test",
)
def test_a_launcher_that_is_not_installed_is_refused_with_what_to_type(tmp_path: Path) -> None:
    done = run(tmp_path, "-m", "hydra/launcher=slurm_gpu", *TINY, "batch.seed=1,2", "format=json")
    assert done.returncode == 2
    assert "pip install 'zinfer[launchers]'" in document(done)["problems"][0]


@pytest.mark.skipif(
    not installed("hydra_submitit_launcher"), reason="needs pip install 'zinfer[launchers]'"
)
def test_slurm_presets_have_the_settings_of_the_installed_launcher() -> None:
    """A preset replaces the plugin's own defaults, so each of them must be in it."""
    with initialize_config_dir(str(CONF), version_base="1.3"):
        theirs = compose(
            "config", overrides=["hydra/launcher=submitit_slurm"], return_hydra_config=True
        ).hydra.launcher
        ours = compose(
            "config", overrides=["hydra/launcher=slurm_gpu"], return_hydra_config=True
        ).hydra.launcher
    assert set(ours) == set(theirs)
