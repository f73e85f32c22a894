"""A swap folder is removed when its owner is surely dead, and left alone in every other case."""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.claiming import CLAIM, ID
from tests.helpers.sweeping import environment
from zinfer.job.swap import (
    Life,
    boot_id,
    claimed_swap_folder,
    held_swap_folder,
    judged,
    remove_orphaned_swap_folders,
    remove_swap_folder,
    swap_folder,
)


def owner(path: Path, attempt: str) -> subprocess.Popen[bytes]:
    """Start another process that owns a swap folder under this path."""
    process = subprocess.Popen(
        [sys.executable, "-c", CLAIM, str(path), attempt],
        stdout=subprocess.PIPE,
        env=environment(),
    )
    assert process.stdout is not None
    process.stdout.readline()
    return process


def left(path: Path, **changed: object) -> Path:
    """Leave a swap folder whose owner has died, with some fields of its owner.json changed."""
    with owner(path, ID) as process:
        process.kill()
    folder = swap_folder(str(path), ID)
    record = json.loads((folder / "owner.json").read_text())
    (folder / "owner.json").write_text(json.dumps({**record, **changed}))
    return folder


def life_of(folder: Path, filesystem: str | None) -> Life:
    with judged(folder, filesystem) as life:
        return life


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGTERM])
def test_the_folder_of_a_live_owner_stays_and_that_of_a_dead_one_goes(
    sign: signal.Signals, tmp_path: Path
) -> None:
    with owner(tmp_path, ID) as process:
        assert remove_orphaned_swap_folders(str(tmp_path), "ext4").removed == ()
        process.send_signal(sign)
    folder = swap_folder(str(tmp_path), ID)
    assert remove_orphaned_swap_folders(str(tmp_path), "ext4").removed == (folder,)
    assert list(tmp_path.iterdir()) == []


def test_a_worker_that_outlives_its_driver_still_owns_the_folder(tmp_path: Path) -> None:
    with owner(tmp_path, ID) as driver:
        with held_swap_folder(swap_folder(str(tmp_path), ID)):
            driver.kill()
            driver.wait()
            assert remove_orphaned_swap_folders(str(tmp_path), "ext4").removed == ()
        assert len(remove_orphaned_swap_folders(str(tmp_path), "ext4").removed) == 1


@pytest.mark.parametrize(
    ("changed", "filesystem", "life"),
    [
        ({}, "ext4", Life.DEAD),
        ({}, "nfs4", Life.DEAD),  # the same boot: this kernel would know of the lock
        ({"boot": "another"}, "ext4", Life.DEAD),  # one kernel has mounted it: that one is gone
        ({"boot": "another"}, "nfs4", Life.UNKNOWN),
        ({"boot": "another"}, "overlay", Life.UNKNOWN),
        ({"boot": "another"}, None, Life.UNKNOWN),
        ({"boot": ""}, "nfs4", Life.UNKNOWN),
        ({"locked": False}, "ext4", Life.UNKNOWN),
        ({"id": "fedcba9876543210"}, "ext4", Life.UNKNOWN),
        ({"id": 7}, "ext4", Life.UNKNOWN),
        ({"pid": 1, "host": "elsewhere"}, "ext4", Life.DEAD),  # a pid says nothing
    ],
)
def test_the_owner_is_judged_by_its_lock_and_its_boot(
    changed: dict[str, object], filesystem: str | None, life: Life, tmp_path: Path
) -> None:
    assert boot_id()
    assert life_of(left(tmp_path, **changed), filesystem) is life


@pytest.mark.parametrize("boot", [boot_id(), "that of another host"])
def test_a_live_owner_in_another_pid_namespace_is_alive(boot: str, tmp_path: Path) -> None:
    """Its process id is that of nobody here, or of somebody else."""
    with owner(tmp_path, ID) as process:
        folder = swap_folder(str(tmp_path), ID)
        record = json.loads((folder / "owner.json").read_text())
        (folder / "owner.json").write_text(json.dumps({**record, "pid": 2**22 + 1, "boot": boot}))
        assert life_of(folder, "ext4") is Life.ALIVE
        assert remove_orphaned_swap_folders(str(tmp_path), "ext4").removed == ()
        process.kill()


def test_an_owner_file_that_points_elsewhere_deletes_nothing_there(tmp_path: Path) -> None:
    precious = tmp_path / "home" / f"zinfer-swap-{ID}"
    precious.mkdir(parents=True)
    (precious / "thesis.tex").write_text("years")
    nvme = tmp_path / "nvme"
    nvme.mkdir()
    hostile = left(nvme, job_dir=str(precious), folder=str(precious), swap=str(precious))
    (hostile / "link").symlink_to(precious)
    (nvme / "zinfer-swap-link").symlink_to(precious)
    (nvme / "zinfer-swap-noise").mkdir()
    (nvme / "zinfer-swap-noise" / "owner.json").write_text("[1, 2")
    (nvme / "zinfer-swap-empty").mkdir()
    swept = remove_orphaned_swap_folders(str(nvme), "ext4")
    assert swept.removed == (hostile,)
    assert {path.name for path in swept.unknown} == {"zinfer-swap-noise", "zinfer-swap-empty"}
    assert (precious / "thesis.tex").read_text() == "years"


def test_a_folder_of_an_older_kind_is_left_alone_and_named(tmp_path: Path) -> None:
    """Its owner.json has a process id and no lock."""
    old = tmp_path / "zinfer-swap-0123456789ab"
    old.mkdir()
    (old / "owner.json").write_text(json.dumps({"pid": 2**22 + 1, "start_ticks": 5}))
    swept = remove_orphaned_swap_folders(str(tmp_path), "ext4")
    assert (swept.removed, swept.unknown) == ((), (old,))


def test_the_default_folder_goes_with_its_job_and_one_of_the_users_stays(tmp_path: Path) -> None:
    job = tmp_path / "job"
    job.mkdir()
    with claimed_swap_folder(str(job / "swap"), ID, job) as folder:
        assert remove_swap_folder(folder, job)
    assert not (job / "swap").exists()
    (tmp_path / "swap").mkdir()
    with claimed_swap_folder(str(tmp_path / "swap"), ID, job) as folder:
        assert remove_swap_folder(folder, job)
    assert (tmp_path / "swap").exists()


def test_a_missing_parent_is_not_made(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        claimed_swap_folder(str(tmp_path / "missing" / "x"), ID, tmp_path).__enter__()
    assert not (tmp_path / "missing").exists()


def test_a_claim_that_fails_leaves_nothing(tmp_path: Path) -> None:
    swap_folder(str(tmp_path), ID).mkdir()
    (swap_folder(str(tmp_path), ID) / "x").touch()
    with pytest.raises(OSError):
        claimed_swap_folder(str(tmp_path), ID, tmp_path).__enter__()
    assert [path.name for path in tmp_path.iterdir()] == [f"zinfer-swap-{ID}"]


def test_while_one_process_removes_a_folder_no_other_judges_it_dead(tmp_path: Path) -> None:
    folder = left(tmp_path)
    with (folder / "owner.json").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert life_of(folder, "ext4") is Life.ALIVE
    assert os.path.exists(folder)
