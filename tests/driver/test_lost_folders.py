"""The folder of a job or of a sweep is deleted at a bad moment: it is said, the rest goes on."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.sweeping import (
    TINY,
    delete,
    environment,
    events_of,
    job_runs,
    nothing_is_left,
    start,
    wait_until,
)

pytestmark = pytest.mark.slow


def test_a_job_whose_folder_is_deleted_before_its_worker_looks_says_so(tmp_path: Path) -> None:
    process = start(tmp_path, *TINY, "offload=nvme", "hydra.run.dir=here", "format=json")
    wait_until((tmp_path / "here" / "workers.json").exists, 60, "worker")
    delete(tmp_path / "here")
    assert process.wait(300) == 1
    said = json.loads((tmp_path / "stdout").read_text())
    assert said["status"] == "error"
    assert f"folder {tmp_path / 'here'} was deleted while the job ran" in said["reason"]
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    assert [found["zinfer.status"] for found in job_runs(tmp_path)] == ["error"]
    nothing_is_left(tmp_path)


def test_a_sweep_whose_folder_is_deleted_goes_on_and_accounts_for_every_job(
    tmp_path: Path,
) -> None:
    sweep = ("-m", *TINY, "hydra.sweep.dir=multirun/here", "format=json", "batch.seed=1,2,3")
    process = start(tmp_path, *sweep, "batch.repeats=60")
    wait_until(lambda: len(events_of(tmp_path, "timed")) == 2, 120, "second job")
    delete(tmp_path / "multirun")
    assert process.wait(300) in (0, 1), (tmp_path / "stderr").read_text()
    said = json.loads((tmp_path / "stdout").read_text())
    ends = [job["status"] for job in said["jobs"]]
    assert ends[0] == ends[2] == "ok"
    assert ends[1] in ("ok", "error")
    assert "Traceback" not in (tmp_path / "stderr").read_text()
    logged = {found["run_id"]: found["zinfer.status"] for found in job_runs(tmp_path)}
    assert [logged[job["run_id"]] for job in said["jobs"]] == ends
    nothing_is_left(tmp_path)


@pytest.mark.parametrize("command", ["hydra.run.dir=disk/job", "-m hydra.sweep.dir=disk/sweep"])
def test_a_disk_that_is_full_from_the_start_is_refused_in_a_sentence(
    command: str, tmp_path: Path
) -> None:
    private = ["unshare", "--mount", "--propagation", "private"]
    if subprocess.run([*private, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs to be root, to mount a small disk of its own")
    (tmp_path / "disk").mkdir()
    arguments = " ".join((*TINY, command, "format=json"))
    script = (
        "mount -t tmpfs -o size=8k tmpfs disk && head -c 8192 /dev/zero > disk/ballast; "
        f"{sys.executable} -m zinfer {arguments}"
    )
    done = subprocess.run(
        [*private, "sh", "-c", script],
        cwd=tmp_path,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2, done.stderr
    (problem,) = json.loads(done.stdout)["problems"]
    assert "No space left on device" in problem and "Set hydra." in problem
    assert "Traceback" not in done.stderr
