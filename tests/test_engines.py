"""What the ZeRO engine arranges in its process before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

GATHERING = """
import os, sys, tempfile
import torch
torch.distributed.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
from zinfer.engines.zero import gather_in_one_thread
if sys.argv[1] == "one":
    gather_in_one_thread()
piece = torch.ones(1 << 20)
(piece + 1).sum()
before = len(os.listdir("/proc/self/task"))
for _ in range(20):
    handles = [torch.distributed.all_gather([torch.empty_like(piece)], piece, async_op=True) for _ in range(4)]
    [handle.wait() for handle in handles]
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("way", "more_threads"), [("one", 0), ("teams", 2)])
def test_gloo_s_threads_start_no_teams_of_their_own(way: str, more_threads: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second row is what happens otherwise: each of gloo's two threads starts one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "2")
    root = Path(__file__).parents[1]
    answer = subprocess.run([sys.executable, "-c", GATHERING, way], cwd=root, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == f"2 {more_threads}"
