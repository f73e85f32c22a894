"""A swap path that nobody meant is refused or warned of, before it is measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.driver.disks import describe_disk, unlike_nvme
from zinfer.driver.refusals import unusable_nvme_path
from zinfer.redact import redact


def problems(path: str, job_dir: Path) -> list[str]:
    config = composed("offload=nvme", f"offload.nvme_path='{path}'")
    return unusable_nvme_path(config, job_dir)


@pytest.mark.parametrize("missing", ["nonexist/x", "local_nvm/zinfer/deep", "a b/c"])
def test_a_path_whose_parent_is_missing_is_refused_and_not_made(
    missing: str, tmp_path: Path
) -> None:
    (problem,) = problems(str(tmp_path / missing), tmp_path / "job")
    assert "does not exist" in problem and "mkdir -p" in problem
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("fine", ["", "new"])
def test_a_path_that_is_there_or_is_to_be_made_in_one_is_taken(fine: str, tmp_path: Path) -> None:
    assert problems(str(tmp_path / fine), tmp_path / "job") == []


def test_the_jobs_own_swap_folder_may_be_made(tmp_path: Path) -> None:
    assert problems(str(tmp_path / "outputs" / "1" / "swap"), tmp_path / "outputs" / "1") == []
    assert problems(str(tmp_path / "elsewhere" / "swap"), tmp_path / "outputs" / "1") != []


def test_a_file_is_no_folder(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    (problem,) = problems(str(tmp_path / "file" / "x"), tmp_path / "job")
    assert "is not a folder" in problem


@pytest.mark.parametrize("below", ["", "/x"])
def test_a_file_that_is_named_like_a_password_is_shown(below: str, tmp_path: Path) -> None:
    """`passwd: VALUE` is hidden as a secret: the sentence must not have that form."""
    (tmp_path / "passwd").touch()
    (problem,) = problems(f"{tmp_path}/passwd{below}", tmp_path / "job")
    assert redact(problem) == problem
    assert problem.startswith(f"offload.nvme_path={tmp_path}/passwd{below} is ")


@pytest.mark.parametrize("path", ["/proc", "/proc/new", "/sys"])
def test_a_folder_in_which_none_can_be_made_is_refused(path: str, tmp_path: Path) -> None:
    (problem,) = problems(path, tmp_path / "job")
    assert f"offload.nvme_path={path}: " in problem and ". Set offload.nvme_path=" in problem


def test_looking_if_a_folder_can_be_made_leaves_nothing(tmp_path: Path) -> None:
    assert problems(str(tmp_path), tmp_path / "job") == []
    assert list(tmp_path.iterdir()) == []


def test_a_home_folder_is_meant_by_a_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert problems("~/swap-here", tmp_path / "job") == []
    (problem,) = problems("~/missing/swap-here", tmp_path / "job")
    assert str(tmp_path / "missing") in problem


@pytest.mark.parametrize(
    ("filesystem", "mount", "words"),
    [
        ("tmpfs", "/dev/shm", "in memory"),
        ("overlay", "/", "container"),
        ("nfs4", "/home", "network"),
        ("9p", "/mnt", "network"),
        ("ext4", "/", "operating system"),
        ("ext4", "/local_nvme", None),
        ("xfs", "/data", None),
    ],
)
def test_what_is_hardly_a_local_nvme_disk_is_warned_of(
    filesystem: str, mount: str, words: str | None
) -> None:
    warning = unlike_nvme(filesystem, mount)
    assert warning is None if words is None else warning is not None and words in warning


def test_a_disk_is_described_by_device_file_system_and_mount() -> None:
    said = describe_disk(Path("/dev/shm/new"))
    assert "tmpfs on " in said.text and "mounted at /dev/shm" in said.text and "free" in said.text
    assert said.filesystem == "tmpfs" and len(said.warnings) == 1
