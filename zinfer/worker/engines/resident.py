"""Plain transformers, all weights on the device: the baseline that offloading is compared with."""

from __future__ import annotations

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

from zinfer.config import RunConfig
from zinfer.job.events import EventLog
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.dummy import dummy_model
from zinfer.model.weights.pretrained import open_checkpoint, pretrained_model, verify
from zinfer.worker.engines import Engine, tokenizer_for
from zinfer.worker.quantised.building import dummy_packed
from zinfer.worker.quantised.choice import packed_choice
from zinfer.worker.quantised.loading import packed_model
from zinfer.worker.quantised.searched import searched_if_asked
from zinfer.worker.ranks import of_all_ranks


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
    packed = packed_choice(config, spec, device, partial(of_all_ranks, ranks=ranks))
    dtype = getattr(torch, spec.dtype)
    quantised = config.dtype if config.quantiser else None
    place = mover(device)
    verified = None
    with torch.no_grad():
        if config.weights == "pretrained":
            opened = open_checkpoint(config.model, dtype, events)
            read = (
                packed_model(
                    opened,
                    quantised,
                    dtype,
                    place,
                    events,
                    searched=searched_if_asked(opened, config, spec, events),
                )
                if quantised
                else pretrained_model(opened, dtype, events)
            )
            model = read.model.to(device)
            verified = verify(opened, read, events)
        elif quantised:
            model = dummy_packed(config.model, quantised, spec, dtype, place, events).to(device)
        else:
            model = dummy_model(config.model, spec, dtype, device, events)
    model.eval()
    return Engine(
        model=model,
        tokenizer=tokenizer_for(config, events),
        device=device,
        rank=rank,
        ranks=ranks,
        weight_stored_bytes=sum(
            parameter.numel() * parameter.element_size() for parameter in model.parameters()
        ),
        verified=verified,
        packed=packed,
    )


def mover(device: torch.device) -> Callable[[torch.nn.Parameter], None]:
    """Return what moves a parameter to the device as soon as it has its values."""

    def place(parameter: torch.nn.Parameter) -> None:
        parameter.data = parameter.data.to(device)

    return place
