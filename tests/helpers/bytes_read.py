"""Load packed weights under ZeRO-3 and generate; run by each rank of one torchrun.

Usage: bytes_read.py CHECKPOINT OUT [OVERRIDE...]. Every rank writes OUT/RANK.json: the bytes that
it read while the model was built, those that it stores, and the tokens of its rows.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import torch

from tests.helpers.composing import composed
from tests.helpers.tiny_models import padded_prompts
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.plan.deepspeed_json import deepspeed_json
from zinfer.worker.engines import zero, zero_packed

NEW_TOKENS = 8


def read_so_far() -> int:
    """Return the bytes that this process has read by system calls, from the page cache or not."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("rchar"))


if __name__ == "__main__":
    source, out, *more = sys.argv[1:]
    ranks = int(os.environ["WORLD_SIZE"])
    config = composed(
        "model=custom", f"model.source={source}", "weights=pretrained", "dtype=int4",
        "dtype.compute=float32", "offload=none", f"launcher.ranks={ranks}", "batch.batch_size=4",
        *more,
    )  # fmt: skip
    spec = model_spec(config.model, compute_dtype="float32")
    original, read = zero_packed.packed_model, [0]

    def counting(*args: object, **settings: object) -> object:
        """Count what loading reads."""
        before = read_so_far()
        found = original(*args, **settings)  # type: ignore[arg-type]
        read[0] += read_so_far() - before
        return found

    zero_packed.packed_model = counting  # type: ignore[assignment]
    rank = int(os.environ["RANK"])
    folder = Path(out)
    engine = zero.load(config, spec, deepspeed_json(config, spec), EventLog(folder, rank, "a"))
    ids, mask = padded_prompts()
    rows = slice(rank * len(ids) // ranks, (rank + 1) * len(ids) // ranks)
    settings = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    with torch.no_grad():
        tokens = engine.model.generate(ids[rows], attention_mask=mask[rows], **settings)
    document = {
        "read_bytes": read[0],
        "stored_bytes": engine.weight_stored_bytes,
        "tokens": tokens.tolist(),
    }
    (folder / f"{rank}.json").write_text(json.dumps(document))
    torch.distributed.destroy_process_group()
    sys.stdout.flush()
    os._exit(0)  # as workers end: a thread of gloo that still runs would abort the process
