"""Run a model under DeepSpeed ZeRO stage 3, which keeps its weights on any tier.

Besides it only zero_packed.py, zero_kept.py, weights/dummy.py (zero.Init) and native_ops.adopt
import deepspeed.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterable
from contextlib import AbstractContextManager
from dataclasses import replace
from functools import partial
from typing import Any

import deepspeed
import torch
from deepspeed import comm
from deepspeed.accelerator import get_accelerator
from transformers.integrations.deepspeed import HfDeepSpeedConfig

from zinfer.config import RunConfig
from zinfer.job.events import EventLog
from zinfer.machine import native_ops
from zinfer.machine.huge_pages import into_huge_pages
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.dummy import dummy_model_partitioned
from zinfer.model.weights.pretrained import (
    Opened,
    Read,
    open_checkpoint,
    pretrained_model,
    verify,
)
from zinfer.plan.deepspeed_json import model_is_leaf
from zinfer.plan.zero_layout import ZeroLayout, zero_layout
from zinfer.worker.engines import Engine, tokenizer_for
from zinfer.worker.engines.zero_kept import keep_gathered
from zinfer.worker.engines.zero_packed import build_packed
from zinfer.worker.quantised.choice import packed_choice
from zinfer.worker.ranks import of_all_ranks
from zinfer.worker.skinny.choice import linear_choice
from zinfer.worker.skinny.modules import use_own_products

GATHERS, GATHERED_NUMEL = 16, 1 << 17
"""More gathers than gloo has threads, each so long that the next one finds another thread.

PyTorch copies that many elements in parallel.
"""


def load(config: RunConfig, spec: ModelSpec, ds_json: dict[str, Any], events: EventLog) -> Engine:
    """Build the model partitioned and offloaded as ds_json says."""
    accelerator = get_accelerator()
    native_ops.adopt(native_ops.ops_of(config))
    deepspeed.init_distributed(dist_backend=accelerator.communication_backend_name(), verbose=False)
    gather_in_one_thread()
    gc.freeze()  # the collector need not walk the libraries again while the model is timed
    device = torch.device(accelerator.current_device_name())
    share = partial(of_all_ranks, ranks=comm.get_world_size())
    linear = linear_choice(config, spec, on_cpu=device.type == "cpu", share=share)
    packed = packed_choice(config, spec, device, share)
    dtype = getattr(torch, spec.dtype)
    opened = None if config.weights == "dummy" else open_checkpoint(config.model, dtype, events)
    build = build_packed if config.quantiser == "zinfer" else build_plain
    with torch.no_grad():
        read, alive = build(config, spec, ds_json, opened, events)
    model = read.model.eval()
    engine, *_ = deepspeed.initialize(model=model, config=ds_json)
    module = engine.module.eval()
    if model_is_leaf(config):
        keep_gathered(engine, module)
    if config.stages_in_huge_pages:
        stage_in_huge_pages(module, zero_layout(config, spec))
    if linear is not None:
        layers = use_own_products(module, linear.own, linear.rows)
        if events.rank == 0:
            events.write("note", message=linear.sentence(layers))
    module._zinfer_keeps_alive = (engine, alive)
    require_partitions(module, config.launcher.ranks * config.launcher.nodes)
    verified = None
    if opened is not None:
        verified = verify(
            opened,
            replace(read, model=module),
            events,
            gather=gathered,
            ranks=comm.get_world_size(),
        )
    return Engine(
        model=module,
        tokenizer=tokenizer_for(config, events),
        device=device,
        rank=comm.get_rank(),
        ranks=comm.get_world_size(),
        weight_stored_bytes=partition_bytes(module, dtype.itemsize),
        verified=verified,
        gathered_bytes=count_gathers(module),
        linear=linear,
        packed=packed,
    )


def build_plain(
    config: RunConfig,
    spec: ModelSpec,
    ds_json: dict[str, Any],
    opened: Opened | None,
    events: EventLog,
) -> tuple[Read, HfDeepSpeedConfig]:
    """Build the model under zero.Init. Weights in 8 or 4 bits are DeepSpeed's own."""
    dtype = getattr(torch, spec.dtype)
    # While this lives, transformers builds models under zero.Init.
    alive = HfDeepSpeedConfig(ds_json)
    if opened is not None:
        ranks = comm.get_world_size()
        return pretrained_model(opened, dtype, events, zero3_ranks=ranks), alive
    model = dummy_model_partitioned(config.model, spec, ds_json, dtype, events)
    return Read(model=model, samples=None), alive


def gather_in_one_thread() -> None:
    """Let each of gloo's threads copy alone, without a team of OMP_NUM_THREADS of its own.

    DeepSpeed gathers parameters while a checkpoint is loaded. The teams that gloo's threads start
    then stay. OpenMP counts more threads than processors, and lets the main thread's team sleep
    between operations: decode steps of a small model take 1.4 times as long for the rest of the
    run. A thread keeps the number of threads that is set when it first copies.
    Source: libgomp, gomp_throttled_spin_count_var; ATen/Parallel.h, lazy_init_num_threads.
    """
    if torch.distributed.get_backend() != "gloo" or torch.get_num_threads() == 1:
        return
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    piece = torch.zeros(GATHERED_NUMEL)
    pieces = [
        [torch.empty_like(piece) for _ in range(torch.distributed.get_world_size())]
        for _ in range(GATHERS)
    ]
    for handle in [
        torch.distributed.all_gather(into, piece, async_op=True) for into in pieces
    ]:  # at once, so that every thread gets one
        handle.wait()
    torch.set_num_threads(threads)


def stage_in_huge_pages(model: torch.nn.Module, layout: ZeroLayout) -> None:
    """Put the part of each NVMe staging buffer that decoder layers use into huge pages.

    A buffer is as large as the largest parameter, mostly an embedding, which is read once or twice
    a pass; the rest stays as it is. The end of the run measures what the kernel gave
    (huge_page_bytes).
    """
    swapper = next(
        (
            parameter.nvme_swapper
            for parameter in model.parameters()
            if getattr(parameter, "nvme_swapper", None)
        ),
        None,
    )
    if swapper is None:
        return
    buffers, size = swapper.buffers, swapper.buffers.element_size()
    every = swapper.aligned_elements_per_buffer * size
    used = (layout.largest_swapped_in_layers_numel or swapper.elements_per_buffer) * size
    into_huge_pages(
        buffers.data_ptr(),
        buffers.nbytes,
        [(number * every, used) for number in range(swapper.param_buffer_count)],
    )


def count_gathers(model: torch.nn.Module) -> Callable[[], int]:
    """Count the bytes of all parameters that modules have gathered, from now on.

    Each is counted when it is made whole: after its copy to the device or its read from disk.
    """
    gathered = [0]

    def counting(gather: Callable[..., Any], params: Iterable[Any], **settings: Any) -> Any:
        together = list(params)
        gathered[0] += sum(each.ds_numel * each.element_size() for each in together)
        return gather(together, **settings)

    for parameter in model.parameters():
        parameter.all_gather_coalesced = partial(counting, parameter.all_gather_coalesced)
    return lambda: gathered[0]


def partition_bytes(model: torch.nn.Module, itemsize_bytes: int) -> int:
    """Return the bytes of this rank's partitions, on whichever tier they are.

    A partition on NVMe has a placeholder of two bytes for its data, so the size of an element is
    given.
    """
    return sum(parameter.ds_tensor.ds_numel for parameter in model.parameters()) * itemsize_bytes


def gathered(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Make one partitioned parameter whole for a block. All ranks must enter it."""
    return deepspeed.zero.GatheredParameters([parameter], modifier_rank=None)


def require_partitions(model: torch.nn.Module, asked_ranks: int) -> None:
    """Make sure that the ranks hold the model once between them, and are as many as asked for.

    A model that was built before the process group existed is whole on every rank, silently
    (DeepSpeed issue 8084).

    Raises:
        RuntimeError: says which number is wrong.
    """
    ranks = comm.get_world_size()
    if ranks != asked_ranks:
        raise RuntimeError(f"{ranks} ranks run this job, {asked_ranks} were asked for")
    parameters = list(model.parameters())
    plain = [name for name, each in model.named_parameters() if not hasattr(each, "ds_tensor")]
    if plain:
        raise RuntimeError(f"{len(plain)} parameters are not partitioned: {', '.join(plain[:3])}")
    held = torch.tensor(sum(each.ds_tensor.ds_numel for each in parameters), dtype=torch.int64)
    if ranks > 1:
        held = held.to(get_accelerator().current_device_name())
        torch.distributed.all_reduce(held)
    problem = partition_problem([each.ds_numel for each in parameters], int(held), ranks)
    if problem:
        raise RuntimeError(problem)


def partition_problem(numel: list[int], held: int, ranks: int) -> str | None:
    """Say how the partitions fail to add up to the model; None when they do.

    Each parameter is padded until it divides by the ranks: at most `ranks` elements.

    Args:
        numel: elements of each whole parameter.
        held: elements of all partitions on all ranks.
    """
    whole, padding = sum(numel), ranks * len(numel)
    if whole <= held <= whole + padding:
        return None
    return (
        f"the partitions of {ranks} ranks hold {held} elements, the model has {whole}: "
        "it was not partitioned as asked"
    )
