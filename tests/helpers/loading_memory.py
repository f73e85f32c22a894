"""Load a packed checkpoint and print the memory that it took: CHECKPOINT DTYPE STAYS FOLDER."""

from __future__ import annotations

import gc
import json
import sys
from pathlib import Path

import torch

from tests.helpers.composing import composed
from zinfer.config import ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.pretrained import open_checkpoint
from zinfer.worker.quantised.loading import packed_model


def bytes_of(field: str) -> int:
    """Read one of this process's memory counters."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{field}:"))


def load(checkpoint: str, dtype: str, stays: bool, folder: str) -> dict[str, int]:
    """Return bytes by which memory grew at its peak, bytes stored, and bytes of the checkpoint."""
    events = EventLog(Path(folder), 0, "attempt")
    model = ModelConfig(name="custom", source=checkpoint)
    opened = open_checkpoint(model, torch.bfloat16, events)
    stored: list[int] = []

    def place(parameter: torch.nn.Parameter) -> None:
        stored.append(parameter.nbytes)
        if not stays:
            parameter.data = parameter.data[:0].clone()

    gc.collect()
    before = bytes_of("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    packed_model(opened, composed(f"dtype={dtype}").dtype, torch.bfloat16, place, events)
    grown = bytes_of("VmHWM") - before
    assert opened.checkpoint is not None
    whole = sum(each.bytes for each in opened.checkpoint.tensors.values())
    return {"grown_bytes": grown, "stored_bytes": sum(stored), "checkpoint_bytes": whole}


def main(checkpoint: str, dtype: str, stays: bool, folder: str) -> None:
    """Load twice and print the second: the first imports what loading needs."""
    load(checkpoint, dtype, False, folder)
    print(json.dumps(load(checkpoint, dtype, stays, folder)))


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], sys.argv[3] == "True", sys.argv[4])
