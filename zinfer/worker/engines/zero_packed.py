"""Build a model with packed weights under DeepSpeed ZeRO stage 3, one weight after the other.

Each rank reads, or makes, and packs what it holds. DeepSpeed alone would send every weight from
rank 0 to all.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from zinfer.config import ConfigError, RunConfig
from zinfer.job.events import EventLog
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.pretrained import Opened, Read
from zinfer.worker.quantised.building import dummy_packed
from zinfer.worker.quantised.loading import packed_model
from zinfer.worker.quantised.parts import Part
from zinfer.worker.quantised.searched import SearchedWeights, searched_if_asked
from zinfer.worker.ranks import of_all_ranks


def build_packed(
    config: RunConfig,
    spec: ModelSpec,
    ds_json: dict[str, Any],
    opened: Opened | None,
    events: EventLog,
) -> tuple[Read, HfDeepSpeedConfig]:
    """Build the model with packed weights, each partitioned and swapped before the next one.

    Raises:
        ConfigError: gathers would add bytes up.
    """
    if ds_json["zero_optimization"].get("stage3_use_all_reduce_for_fetch_params"):
        raise ConfigError(
            [
                "stage3_use_all_reduce_for_fetch_params gathers weights by adding partitions up, "
                "and packed weights are no numbers. Set it to false, or dtype=bfloat16"
            ]
        )
    dtype = getattr(torch, spec.dtype)
    partition = deepspeed.zero.Init(config_dict_or_path=ds_json)

    def place_whole(parameter: torch.nn.Parameter) -> None:
        partition._convert_to_zero_parameters([parameter])

    part = own_part()
    place = partial(place_part, partition) if part else place_whole
    if opened is not None:
        searched = searched_if_asked(opened, config, spec, events)
        require_one_checkpoint(opened, searched)
        read = packed_model(
            opened,
            config.dtype,
            dtype,
            place,
            events,
            part=part,
            searched=searched,
        )
    else:
        model = dummy_packed(config.model, config.dtype, spec, dtype, place, events, part=part)
        read = Read(model=model, samples=None)
    return read, HfDeepSpeedConfig(ds_json)


def place_part(partition: Any, parameter: torch.nn.Parameter) -> None:
    """Partition a parameter of which this rank holds its own part only.

    DeepSpeed's _convert_to_zero_parameters does the same, but first sends all values of rank 0 to
    the others.
    """
    parameter.data = parameter.data.to(partition.local_device)
    partition._convert_to_deepspeed_param(parameter)
    parameter.partition()


def own_part() -> Part | None:
    """Return what this rank reads and packs of each weight; None: all, for it is the only one."""
    ranks = comm.get_world_size()
    if ranks == 1:
        return None
    device = get_accelerator().current_device_name()

    def gather(mine: torch.Tensor) -> list[torch.Tensor]:
        sent = mine.to(device)
        every = [torch.empty_like(sent) for _ in range(ranks)]
        torch.distributed.all_gather(every, sent)
        return [each.cpu() for each in every]

    return Part(rank=comm.get_rank(), ranks=ranks, gather=gather)


def require_one_checkpoint(opened: Opened, searched: SearchedWeights | None) -> None:
    """Make sure that ranks on several machines read the same weights.

    Raises:
        ConfigError: on every rank.
    """
    ranks = comm.get_world_size()
    if ranks == 1:
        return  # a fingerprint reads files
    mine = (opened.fingerprint(), searched.fingerprint() if searched else None)
    found = of_all_ranks(mine, ranks)
    others = [rank for rank, theirs in enumerate(found) if theirs != found[0]]
    if others:
        raise ConfigError(
            [
                f"{opened.source} holds other weights on rank {others[0]} than on rank 0. Give "
                "every machine the same files"
            ]
        )
