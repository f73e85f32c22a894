"""Generate under ZeRO-3 with packed weights of every family; run by each rank of one torchrun.

Usage: packed_families.py FOLDER OFFLOAD:NAME... where FOLDER/NAME is a checkpoint. Rank 0 writes
FOLDER/tokens.json: name -> rows of token ids.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from tests.helpers.composing import composed
from tests.helpers.tiny_models import padded_prompts
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.plan.deepspeed_json import deepspeed_json
from zinfer.worker.engines.zero import load
from zinfer.worker.quantised import parts

NEW_TOKENS = 8


def overrides(folder: Path, offload: str, bits: int) -> tuple[str, ...]:
    """Return the settings of one family's run. What is swapped goes beside its checkpoint."""
    disk = (f"offload.nvme_path={folder}-swap",) if offload == "nvme" else ()
    return (
        *disk,
        "model=custom", f"model.source={folder}", "weights=pretrained", f"dtype=int{bits}",
        "dtype.compute=float32", "dtype.group_size=32", f"offload={offload}",
    )  # fmt: skip


def tokens(folder: Path, offload: str, events: EventLog) -> list[list[int]]:
    """Load one checkpoint as a run does, and generate."""
    ranks = f"launcher.ranks={os.environ['WORLD_SIZE']}"
    config = composed(*overrides(folder, offload, 8), ranks, "batch.batch_size=4")
    spec = model_spec(config.model, compute_dtype="float32")
    engine = load(config, spec, deepspeed_json(config, spec), events)
    assert engine.verified is not None
    if offload == "nvme":
        assert any(Path(f"{folder}-swap").rglob("*.swp")), "nothing was swapped"
    ids, mask = padded_prompts()
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        found: torch.Tensor = engine.model.generate(ids, attention_mask=mask, **settings)
    unset_hf_deepspeed_config()  # the next model is built like a first one
    rows: list[list[int]] = found.tolist()
    return rows


if __name__ == "__main__":
    parts.WHOLE_BYTES = 512  # so that these small models are read in parts too
    root = Path(sys.argv[1])
    said = {}
    for argument in sys.argv[2:]:
        offload, _, name = argument.partition(":")
        said[name] = tokens(root / name, offload, EventLog(root, 0, "attempt"))
    if torch.distributed.get_rank() == 0:
        (root / "tokens.json").write_text(json.dumps(said))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as workers end: a thread of gloo that still runs would abort the process
