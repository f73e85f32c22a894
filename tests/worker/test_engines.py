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

KEEPING = """
import os
os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(29000 + os.getpid() % 1000))
import deepspeed, torch
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from zinfer.worker.engines.zero_kept import keep_gathered

class Tied(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = torch.nn.Sequential(torch.nn.Linear(6, 5), torch.nn.LayerNorm(5))
        self.last = torch.nn.Linear(6, 5, bias=False)
        self.last.weight = self.inner[0].weight

    def forward(self, x):
        return self.inner(x) + self.last(x)

deepspeed.init_distributed(dist_backend="gloo", verbose=False)
settings = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_optimization": {
        "stage": 3, "stage3_param_persistence_threshold": 100, "leaf_module": {"classes": ["Tied"]},
    },
}
with torch.no_grad():
    x, plain = torch.randn(3, 6), Tied().eval()
    expected = plain(x)
    engine, *_ = deepspeed.initialize(model=plain, config=settings)
    model = engine.module.eval()
    keep_gathered(engine, model)
    assert all(each.ds_status == ZeroParamStatus.NOT_AVAILABLE for each in model.parameters())
    for _ in range(3):
        assert torch.equal(model(x), expected)
        assert all(each.ds_status == ZeroParamStatus.AVAILABLE for each in model.parameters())
    with deepspeed.zero.GatheredParameters([model.last.weight]):
        pass  # whoever looks at a weight releases it
    assert model.last.weight.ds_status == ZeroParamStatus.NOT_AVAILABLE
    assert torch.equal(model(x), expected)
hooks = [len(each._forward_pre_hooks) + len(each._forward_hooks) for each in model.modules()]
print("hooks", sum(hooks), flush=True)
os._exit(0)
"""


@pytest.mark.slow
def test_weights_that_stay_gathered_are_gathered_again_after_somebody_looked() -> None:
    answer = subprocess.run(
        [sys.executable, "-c", KEEPING],
        cwd=Path(__file__).parents[2], capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.splitlines()[-1] == "hooks 1"


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
