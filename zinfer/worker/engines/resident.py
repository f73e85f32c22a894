"""Plain transformers, all weights on the device: the baseline that offloading is compared with."""

from __future__ import annotations

import os
from typing import Any

import torch

from zinfer.config import RunConfig
from zinfer.job.events import EventLog
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.dummy import dummy_model
from zinfer.model.weights.pretrained import open_checkpoint, pretrained_model, verify
from zinfer.worker.engines import Engine, tokenizer_for


def load(config: RunConfig, spec: ModelSpec, ds_json: dict[str, Any], events: EventLog) -> Engine:
    """Build the model on this rank's device. ds_json is not used: there is no DeepSpeed here."""
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if ranks > 1:
        torch.distributed.init_process_group()
    device = torch.device(
        f"cuda:{os.environ['LOCAL_RANK']}"
        if torch.cuda.is_available() and os.environ.get("DS_ACCELERATOR") != "cpu"
        else "cpu"
    )
    dtype = getattr(torch, spec.dtype)
    with torch.no_grad():
        if config.weights == "dummy":
            model = dummy_model(config.model, spec, dtype, device, events)
            verified = None
        else:
            opened = open_checkpoint(config.model, dtype, events)
            read = pretrained_model(opened, dtype, events)
            model = read.model.to(device)
            verified = verify(opened, read, events)
    model.eval()
    return Engine(
        model=model,
        tokenizer=tokenizer_for(config, events),
        device=device,
        rank=rank,
        ranks=ranks,
        weight_bytes=sum(
            parameter.numel() * parameter.element_size() for parameter in model.parameters()
        ),
        verified=verified,
    )
