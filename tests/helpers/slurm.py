"""A Slurm of one node for tests, and what they do to its jobs."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers.sweeping import PACKAGE, wait_until

ONE_CPU = (
    "hydra/launcher=slurm_cpu",
    "hydra.launcher.mem_gb=2",
    "hydra.launcher.cpus_per_task=1",
)
SMALL = (*ONE_CPU, "hydra.launcher.array_parallelism=2")
"""Two jobs at a time."""
FOUR = (*ONE_CPU, "hydra.launcher.array_parallelism=4")
"""Four jobs at a time: as many as the node says that it has cores."""
SCRIPT = str(PACKAGE / "scripts" / "slurm_single_machine.sh")


def slurm_of_one_node(folder: Path) -> Iterator[str]:
    """Yield the path of slurm.conf: that of SLURM_CONF, or of a Slurm that ends with the tests."""
    if given := os.environ.get("SLURM_CONF"):
        yield given
        return
    if os.geteuid() != 0 or shutil.which("slurmctld") is None:
        pytest.skip("needs root and Slurm's daemons: make test-slurm installs them")
    try:
        subprocess.run(
            ["bash", SCRIPT, "start", str(folder)],
            check=True,
            timeout=300,
            stdin=subprocess.DEVNULL,
        )
        yield str(folder / "slurm.conf")
    finally:
        subprocess.run(["bash", SCRIPT, "stop", str(folder)], check=True, timeout=60)


class Cluster:
    """Commands of Slurm, as an administrator gives them."""

    def __init__(self, conf: str) -> None:
        self.conf = conf

    def __call__(self, *command: str) -> str:
        """Run a command of Slurm and return what it prints."""
        done = subprocess.run(
            command,
            env={**os.environ, "SLURM_CONF": self.conf},
            capture_output=True,
            text=True,
            timeout=60,
            check=True,
        )
        return done.stdout

    def array(self, sweep_dir: Path) -> str:
        """Return the id of the newest array of jobs that a sweep has submitted."""
        found = {path.parent.name for path in sweep_dir.glob(".submitit/*/*_submitted.pkl")}
        return max((name.partition("_")[0] for name in found), key=int)

    def jobs(self) -> list[str]:
        """Return the jobs that run or wait to run."""
        return self("squeue", "--noheader", "--array", "--format=%i").split()

    def node_fails(self) -> None:
        """Take the only node down, and bring it back: its jobs are requeued."""
        (node,) = set(self("sinfo", "--noheader", "--format=%n").split())
        self("scontrol", "update", f"nodename={node}", "state=down", "reason=test")
        self("scontrol", "update", f"nodename={node}", "state=resume")

    @property
    def slurmd(self) -> Path:
        """Return the file with the process id of the node's daemon."""
        return Path(self.conf).with_name("slurmd.pid")

    def kill_slurmd(self) -> None:
        """Kill the node's daemon with SIGKILL; jobs that run have processes of their own."""
        if not self.slurmd.is_file():
            pytest.skip("needs a Slurm of the test's own: unset SLURM_CONF")
        os.kill(int(self.slurmd.read_text()), signal.SIGKILL)

    def start_slurmd(self) -> None:
        """Start the node's daemon again."""
        self("slurmd", "-f", self.conf)

    def wait_until_empty(self, seconds: float) -> None:
        """Wait until no job is left."""
        wait_until(lambda: not self.jobs(), seconds, "empty queue")
