"""What the ZeRO engine arranges in its process before a model is loaded."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest


def test_the_last_tokens_of_a_prefill_are_one_matrix_with_an_unpacked_head(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """PyTorch's own linear makes a batch of them, and a copy of the head for each row."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    from zinfer.worker.engines.zero import multiply_in_one_matrix

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            names.append(func.overloadpacket.__name__)
            return func(*args, **(kwargs or {}))

    monkeypatch.setattr(
        torch.nn.functional, "linear", torch.nn.functional.linear
    )  # put back afterwards
    last, head = torch.randn(4, 32, 64)[:, -1:, :], torch.randn(1000, 64)
    products = []
    for _ in range(2):
        names: list[str] = []
        with torch.no_grad(), Seen():
            products.append(torch.nn.functional.linear(last, head))
        assert ("bmm" in names) == (len(products) == 1)
        multiply_in_one_matrix()
    torch.testing.assert_close(*products)


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
print(torch.get_num_threads(), len(os.listdir("/proc/self/task")) - before)
"""


@pytest.mark.slow
def test_gloo_s_threads_start_no_teams_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """How many they start otherwise is PyTorch's affair; that is only printed."""
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
