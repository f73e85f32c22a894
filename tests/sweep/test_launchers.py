"""The same sweep under every launcher of Hydra: a killed worker costs its own job only."""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from hydra import compose, initialize_config_dir

from tests.helpers.composing import CONF
from tests.helpers.sweeping import (
    PACKAGE,
    TINY,
    document,
    events_of,
    job_runs,
    nothing_is_left,
    run,
    start,
    statuses,
    wait_until,
)
from tests.misbehaving import sitecustomize as fate

SEEDS = f"batch.seed=1,{fate.KILLED},2"
SLURM_SMALL = (
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.cpus_per_task=1",
    "hydra.launcher.array_parallelism=2",
)


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


@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher",
    [
        pytest.param(("hydra/launcher=local_processes",), marks=needs_joblib, id="joblib"),
        pytest.param(("hydra/launcher=submitit_local",), marks=needs_submitit, id="submitit_local"),
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
@needs_joblib
def test_jobs_in_other_processes_end_with_an_interrupted_sweep(tmp_path: Path) -> None:
    process = start(
        tmp_path,
        "-m",
        "hydra/launcher=local_processes",
        *TINY,
        f"batch.seed={fate.SLEEP},{fate.HANG},1",
        misbehaving=True,
    )
    wait_until(lambda: len(events_of(tmp_path, "sample")) == 2, 120, "sample of two jobs")
    process.send_signal(signal.SIGINT)
    assert process.wait(30) == 130
    nothing_is_left(tmp_path)
    assert {logged["zinfer.status"] for logged in job_runs(tmp_path)} == {"killed"}


@pytest.fixture(scope="module")
def slurm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Return the configuration of a Slurm of one node; start one where none is there."""
    if given := os.environ.get("SLURM_CONF"):
        yield given
        return
    if os.geteuid() != 0:
        pytest.skip("starting a Slurm controller needs root")
    folder = tmp_path_factory.mktemp("slurm")
    script = str(PACKAGE / "scripts" / "slurm_single_machine.sh")
    subprocess.run(
        ["bash", script, "start", str(folder)], check=True, timeout=300, stdin=subprocess.DEVNULL
    )
    yield str(folder / "slurm.conf")
    subprocess.run(["bash", script, "stop", str(folder)], check=True, timeout=60)


@pytest.mark.slow
@pytest.mark.slurm
@needs_submitit
def test_a_real_slurm_runs_the_sweep_and_goes_on_with_it(slurm: str, tmp_path: Path) -> None:
    sweep = ("-m", "hydra/launcher=slurm_cpu", *SLURM_SMALL, *TINY, SEEDS, "format=json")
    done = run(tmp_path, *sweep, misbehaving=True, SLURM_CONF=slurm)
    assert statuses(done) == ["ok", "killed", "ok"], done.stderr
    assert done.returncode == 1
    nothing_is_left(tmp_path)
    again = run(tmp_path, *sweep, SLURM_CONF=slurm)
    assert [(job["status"], job.get("reused", False)) for job in document(again)["jobs"]] == [
        ("ok", True),
        ("ok", False),
        ("ok", True),
    ]


@pytest.mark.parametrize("preset", ["slurm_gpu", "slurm_cpu", "local_processes"])
def test_presets_compose_without_their_plugins(preset: str) -> None:
    with initialize_config_dir(str(CONF), version_base="1.3"):
        launcher = compose(
            "config", overrides=[f"hydra/launcher={preset}"], return_hydra_config=True
        ).hydra.launcher
    assert launcher._target_.startswith("hydra_plugins.")


@pytest.mark.skipif(installed("hydra_submitit_launcher"), reason="the launcher is installed here")
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
