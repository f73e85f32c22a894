"""Two containers share a swap folder, each under its own path and with its own process ids."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.helpers.claiming import CLAIM, ID
from tests.helpers.sweeping import environment
from zinfer.job.swap import swap_folder

NAMESPACES = ["unshare", "--pid", "--mount", "--uts", "--fork", "--kill-child", "--mount-proc"]
INSIDE = 'mount --bind "$0" "$1" && exec "$2" -c "$3" "$1" "$4"'
SWEEP = """
import sys
from zinfer.job.swap import remove_orphaned_swap_folders
swept = remove_orphaned_swap_folders(sys.argv[1], "ext4")
print(len(swept.removed), len(swept.unknown))
"""


def container(disk: Path, mounted: Path, code: str) -> subprocess.Popen[str]:
    """Run Python code in namespaces of its own, where the disk is mounted at another path."""
    mounted.mkdir()
    command = [*NAMESPACES, "sh", "-c", INSIDE, disk, mounted, sys.executable, code, ID]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment())


@pytest.fixture(autouse=True)
def _namespaces() -> None:
    if subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode:
        pytest.skip("needs to be root, to make namespaces as containers have them")


def test_a_container_leaves_the_live_folder_of_another_alone_and_removes_a_dead_ones(
    tmp_path: Path,
) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    weights = swap_folder(str(disk), ID) / "weights.bin"
    with container(disk, tmp_path / "one", CLAIM) as owner:
        assert owner.stdout is not None and owner.stdout.readline() == "1\n"
        assert weights.stat().st_size == 4096  # the same disk, seen from outside
        with container(disk, tmp_path / "two", SWEEP) as other:
            assert other.communicate()[0] == "0 0\n"
        assert weights.stat().st_size == 4096
        owner.kill()  # with its namespace, as a container is stopped
    with container(disk, tmp_path / "three", SWEEP) as other:
        assert other.communicate()[0] == "1 0\n"
    assert list(disk.iterdir()) == []
