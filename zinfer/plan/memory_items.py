"""List every use of memory of one rank, tier by tier.

The numbers come from the model's architecture, the ZeRO layout and the DeepSpeed configuration.
Constants that were measured are in process_memory and working_memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.deepspeed_json import derive, gathers_in_place
from zinfer.plan.kv_placement import KvBytes, kv_bytes
from zinfer.plan.process_memory import kept_after_loading, kept_free_factor, process_memory
from zinfer.plan.tiers import Item, ItemKind, Lifetime
from zinfer.plan.working_memory import CUDA_CONTEXT_BYTES, prefill_bytes
from zinfer.plan.zero_layout import ZeroLayout, zero_layout

UNPACKED_NUMEL, FLOAT32_BYTES = 1 << 22, 4
"""Values of a packed matrix that are unpacked at a time, for many rows or without a kernel.

Codes and values are float32 on the way to the compute type. Source: worker/quantised/kernel.py.
"""

throughout = partial(Item, lifetime=Lifetime.RUN)
while_generating = partial(Item, lifetime=Lifetime.GENERATION)


@dataclass(frozen=True)
class Demand:
    """One run whose memory is counted, with what is derived from it once."""

    spec: ModelSpec
    config: RunConfig
    hardware: Hardware

    @cached_property
    def layout(self) -> ZeroLayout:
        """Sizes of the weights as ZeRO-3 stores them."""
        return zero_layout(self.config, self.spec)

    @cached_property
    def zero(self) -> dict[str, Any]:
        """Return the section `zero_optimization` of the run's DeepSpeed JSON."""
        section: dict[str, Any] = derive(self.config, self.spec, self.hardware)["zero_optimization"]
        return section

    @property
    def rows(self) -> int:
        """Sequences of one rank."""
        return self.config.batch.batch_size // self.config.launcher.ranks

    @property
    def partition_bytes(self) -> int:
        """Bytes of one rank's share of the stored weights."""
        numel = -(-self.layout.stored_numel // self.config.launcher.ranks)
        return numel * self.layout.itemsize_bytes

    @property
    def uses_partition_in_place(self) -> bool:
        """Tell if a rank computes with its partition, or with the buffer that it was read into.

        So does one CPU rank, and one rank without offload on any device: nothing is copied.
        """
        launcher = self.config.launcher
        alone = launcher.ranks * launcher.nodes == 1
        alone_on_cpu = self.hardware.device_is_host and alone
        return alone_on_cpu or gathers_in_place(self.config)

    @cached_property
    def kv(self) -> KvBytes | None:
        """KV cache of one rank at the end of a generation. None: not known."""
        on_gpu = not self.hardware.device_is_host
        return kv_bytes(self.spec, self.config, self.rows, on_gpu=on_gpu)


def device_items(run: Demand) -> Iterator[Item]:
    """Return the device memory of one rank at its highest.

    Then the cache is full and the allocator still keeps the states of the last prefill.
    """
    yield from _device_weights(run)
    kv = run.kv.device_bytes if run.kv else 0
    working = prefill_bytes(run.spec, run.rows, run.config.batch.prompt_tokens)
    yield while_generating(name="kv cache", bytes=kv, kind=ItemKind.KV_CACHE)
    for name, count in working.items():
        yield while_generating(name=name, bytes=count, kind=ItemKind.WORKING)
    if run.hardware.device_is_host:
        yield _kept_by_the_allocator(run, kv, sum(working.values()))
    else:
        # torch.cat writes one layer's new cache beside the old one
        copied = 0 if run.config.kv_cache.is_offloaded else kv // max(1, run.spec.num_layers)
        yield while_generating(
            name="kv cache of one layer, copied", bytes=copied, kind=ItemKind.KV_CACHE
        )
        yield throughout(name="CUDA context", bytes=CUDA_CONTEXT_BYTES, kind=ItemKind.CONTEXT)
    if engine_of(run.config).zero3:
        yield from _streamed_weights(run)
    if run.config.offload.use_gds:
        yield from _staging_buffers(run)
    yield from _unpacked_weights(run)


def _device_weights(run: Demand) -> Iterator[Item]:
    """Return the weights that stay on the device for the whole run."""
    size = run.layout.itemsize_bytes
    if not engine_of(run.config).zero3:
        yield from _weights(run, run.layout.stored_numel * size, ranks=1)
    elif run.config.offload.device == "none":
        yield from _weights(run, run.partition_bytes, ranks=run.config.launcher.ranks)
    elif not run.uses_partition_in_place:
        count = run.layout.small_numel * size
        yield throughout(name="persistent weights", bytes=count, kind=ItemKind.WEIGHTS)


def _weights(run: Demand, count: int, *, ranks: int) -> Iterator[Item]:
    """Divide so many bytes of stored weights into packed ones and those of the compute type.

    Args:
        ranks: over which they are divided.
    """
    packed = -(-run.layout.packed_numel // ranks) * run.layout.itemsize_bytes
    if not packed:
        yield throughout(name="weights", bytes=count, kind=ItemKind.WEIGHTS)
        return
    yield throughout(name=f"weights in {_bits_in_words(run)}", bytes=packed, kind=ItemKind.WEIGHTS)
    yield throughout(
        name=f"weights kept in {run.spec.dtype}", bytes=count - packed, kind=ItemKind.WEIGHTS
    )


def _bits_in_words(run: Demand) -> str:
    """Name the packed types: int8, int4, or both."""
    return " and ".join(f"int{bits}" for bits in run.layout.packed_bits)


def _streamed_weights(run: Demand) -> Iterator[Item]:
    """Return copies that ZeRO-3 makes for a moment: gathered, prefetched, dequantised."""
    layout, size = run.layout, run.layout.itemsize_bytes
    if not run.uses_partition_in_place:
        by_deepspeed = run.config.quantiser == "deepspeed"
        largest = layout.largest_numel if by_deepspeed else layout.largest_stored_numel
        live = max(run.zero["stage3_max_live_parameters"], layout.layer_numel, largest)
        bucket = run.zero["stage3_prefetch_bucket_size"]
        for name, numel in (("gathered layers", live), ("prefetched parameters", bucket)):
            count = min(numel, layout.stored_numel) * size
            yield while_generating(name=name, bytes=count, kind=ItemKind.STREAMING)


def _unpacked_weights(run: Demand) -> Iterator[Item]:
    """Return copies of quantised weights in the compute type, for the moment of a product."""
    layout, size = run.layout, run.layout.itemsize_bytes
    if run.config.quantiser == "deepspeed":
        # without DeepSpeed's kernel 4 bits become bytes before they become numbers
        has_kernel = not run.hardware.device_is_host and run.spec.dtype == "float16"
        unpacked = 1 if run.config.dtype.bits == 4 and not has_kernel else 0
        count = (2 * size + unpacked) * layout.largest_numel
        yield while_generating(name="dequantised weights", bytes=count, kind=ItemKind.STREAMING)
    elif layout.packed_numel:
        count = min(UNPACKED_NUMEL, layout.largest_numel) * (2 * FLOAT32_BYTES + size)
        yield while_generating(name="unpacked weights", bytes=count, kind=ItemKind.STREAMING)


def _kept_by_the_allocator(run: Demand, kv: int, working: int) -> Item:
    """Return host memory that was freed and not given back, without an accelerator."""
    work_factor, kv_factor = kept_free_factor(run.config, run.spec)
    kept = (work_factor - 1) * working + (kv_factor - 1) * kv
    kept += kept_after_loading(run.config, run.layout)
    return while_generating(
        name="freed memory that the allocator keeps", bytes=int(kept), kind=ItemKind.ALLOCATOR
    )


def host_items(run: Demand) -> Iterator[Item]:
    """Return the pageable host memory of one rank, the loader's own apart."""
    process = process_memory(run.config, run.hardware.profile)
    for name, count in (
        ("Python and libraries", process.imported_bytes),
        ("kernels and process group", process.growth_bytes),
    ):
        yield throughout(name=name, bytes=count, kind=ItemKind.PROCESS)
    if run.kv and not run.kv.pinned:
        yield while_generating(name="kv cache", bytes=run.kv.host_bytes, kind=ItemKind.KV_CACHE)
    offload = run.config.offload
    if offload.device == "cpu" and not offload.pin_memory:
        yield from _weights(run, run.partition_bytes, ranks=run.config.launcher.ranks)
    if offload.device == "nvme":
        swapped = run.layout.swapped_numel * run.layout.itemsize_bytes
        kept = max(0, run.partition_bytes - swapped)
        yield throughout(name="weights too small to swap", bytes=kept, kind=ItemKind.WEIGHTS)


def pinned_items(run: Demand) -> Iterator[Item]:
    """Return the page-locked host memory of one rank.

    DeepSpeed locks NVMe staging buffers on every accelerator, offloaded weights on GPUs.
    """
    offload = run.config.offload
    if not offload.use_gds:
        yield from _staging_buffers(run)
    if offload.device == "cpu" and offload.pin_memory:
        yield from _weights(run, run.partition_bytes, ranks=run.config.launcher.ranks)
    if run.kv and run.kv.pinned:
        yield while_generating(name="kv cache", bytes=run.kv.host_bytes, kind=ItemKind.KV_CACHE)


def _staging_buffers(run: Demand) -> Iterator[Item]:
    """Return the buffers through which DeepSpeed reads weights from NVMe.

    They are on the device with offload.use_gds=true, else in locked host memory.
    Source: deepspeed/runtime/swap_tensor/partitioned_param_swapper.py, `buffer_device`.
    """
    if run.config.offload.device == "nvme":
        buffers = run.zero["offload_param"]
        count = buffers["buffer_count"] * buffers["buffer_size"] * run.layout.itemsize_bytes
        yield throughout(name="NVMe staging buffers", bytes=count, kind=ItemKind.STREAMING)


def disk_items(run: Demand) -> Iterator[Item]:
    """Return the space that one rank's swapped weights take on the disk of offload.nvme_path."""
    if run.config.offload.device == "nvme":
        count = run.layout.swapped_numel * run.layout.itemsize_bytes
        yield throughout(name="swapped weights", bytes=count, kind=ItemKind.WEIGHTS)
