"""Check what the ZeRO engine arranges in its process before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GATHERING = """
import os, sys, tempfile
import torch
import torch.distributed as dist

file = "file://" + tempfile.mktemp()
dist.init_process_group("gloo", init_method=file, rank=0, world_size=1)
from zinfer.worker.engines.zero import gather_in_one_thread

if sys.argv[1] == "one":
    gather_in_one_thread()
piece = torch.ones(1 << 20)
(piece + 1).sum()
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    into = [[torch.empty_like(piece)] for _ in range(4)]
    for handle in [dist.all_gather(each, piece, async_op=True) for each in into]:
        handle.wait()
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before, flush=True)
os._exit(0)  # as workers end: gloo's threads may not outlive the interpreter's own end
"""


@pytest.mark.slow
def test_gloo_s_threads_start_no_teams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Print only how many they start otherwise: that is PyTorch's affair."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")

    def threads(way: str) -> tuple[int, int]:
        """Count (threads that PyTorch computes with, threads that gathering added)."""
        answer = subprocess.run(
            [sys.executable, "-c", GATHERING, way],
            cwd=Path(__file__).parents[2],
            capture_output=True,
            text=True,
            timeout=120,
        )
        assert answer.returncode == 0, answer.stderr
        kept, more = answer.stdout.splitlines()[-1].split()
        return int(kept), int(more)

    assert threads("one") == (2, 0)
    print("threads that gathering adds without it:", threads("teams")[1])
