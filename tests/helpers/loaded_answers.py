"""Load tiny models under several engines, and save what each says.

One process imports; each model is loaded in a fork of its own. Reads lines of JSON, a list each:
the folder with the model's config.json, then settings. Writes `answer.pt` into each folder: logits
[2, 12, vocabulary], 16 greedy tokens of each row, and whether each parameter of ZeRO-3 is gathered
in place.
"""

from __future__ import annotations

import json
import os
import socket
import sys
import traceback
from pathlib import Path

import torch

from tests.helpers.composing import composed
from zinfer.config.engines import engine_loader
from zinfer.job.events import EventLog
from zinfer.machine.hardware import detect_hardware
from zinfer.plan.planned import plan_run
from zinfer.plan.resolved import resolved_spec
from zinfer.worker.imports import import_everything

NEW_TOKENS = 16


def answer(folder: Path, overrides: list[str]) -> dict[str, torch.Tensor]:
    """Load random weights as a run does, and generate."""
    config = composed("model=custom", f"model.source={folder}", "dtype=float32", *overrides)
    hardware = detect_hardware(config.hardware, config.offload.nvme_folder, 1, 1)
    spec = resolved_spec(config, hardware, print)
    planned = plan_run(config, hardware, spec)
    log = folder / "log"
    log.mkdir()
    engine = engine_loader(config)(config, spec, planned.deepspeed_json(), EventLog(log))
    ids = torch.arange(24).view(2, 12) * 19 % 512
    with torch.no_grad():
        logits = engine.model(input_ids=ids).logits
        tokens = engine.model.generate(
            input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
            max_new_tokens=NEW_TOKENS, eos_token_id=None, pad_token_id=0,
        )[:, 12:]  # fmt: skip
    in_place = [
        each.data_ptr() == each.ds_tensor.data_ptr()
        for each in engine.model.parameters()
        if hasattr(each, "ds_tensor")
    ]
    return {"logits": logits, "tokens": tokens, "is_partition": torch.tensor(in_place)}


def become_a_rank() -> None:
    """Set what torch.distributed reads: one rank, and a port that is free."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    rank = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update({**rank, "MASTER_PORT": port})


def in_a_fork(folder: Path, overrides: list[str]) -> int:
    """Load one model in a child process; return its exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            become_a_rank()
            torch.save(answer(folder, overrides), folder / "answer.pt")
            code = 0
        except Exception:
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)  # as a worker ends: nothing waits for gloo's threads
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> int:
    """Answer every line."""
    import_everything()
    codes = []
    for line in sys.stdin:
        folder, *overrides = json.loads(line)
        codes.append(in_a_fork(Path(folder), overrides))
        if codes[-1]:
            print(f"{folder} {overrides}: exit code {codes[-1]}", file=sys.stderr)
    return int(any(codes))


if __name__ == "__main__":
    raise SystemExit(main())
