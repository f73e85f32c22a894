"""List the libraries that DeepSpeed compiles, and say which of them a run loads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from zinfer.config.engines import engine_of
from zinfer.machine.native_ops.folder import accelerator_name

if TYPE_CHECKING:
    from zinfer.config import RunConfig


@dataclass(frozen=True, kw_only=True)
class NativeOp:
    """One library that DeepSpeed compiles."""

    name: str
    builder: str
    """What DeepSpeed's accelerator calls the class that builds it."""
    accelerators: tuple[str, ...]
    purpose: str


OPS = {
    op.name: op
    for op in (
        NativeOp(
            name="pin_memory",
            builder="PinMemoryBuilder",
            accelerators=("cpu", "cuda"),
            purpose="page-locked host buffers",
        ),
        NativeOp(
            name="async_io",
            builder="AsyncIOBuilder",
            accelerators=("cpu", "cuda"),
            purpose="reads and writes weights on NVMe",
        ),
        NativeOp(
            name="deepspeed_shm_comm",
            builder="ShareMemCommBuilder",
            accelerators=("cpu",),
            purpose="ranks on one CPU machine",
        ),
        NativeOp(
            name="quantizer",
            builder="QuantizerBuilder",
            accelerators=("cuda",),
            purpose="dequantises int4 and int8 in float16",
        ),
        NativeOp(
            name="gds",
            builder="GDSBuilder",
            accelerators=("cuda",),
            purpose="NVMe to GPU without the host (GPUDirect Storage)",
        ),
    )
}


def ops_needed(
    offload_device: str,
    accelerator: str | None = None,
    *,
    quantised_float16: bool = False,
    use_gds: bool = False,
) -> list[str]:
    """List the ops that a DeepSpeed run with this offload target loads, in loading order."""
    kind = accelerator or accelerator_name()
    wanted = {
        # DeepSpeed's process group on a CPU takes it up, whatever is offloaded.
        "deepspeed_shm_comm": kind == "cpu",
        "pin_memory": offload_device == "nvme",  # async_io resolves its symbols
        "async_io": offload_device == "nvme",
        "gds": offload_device == "nvme" and use_gds,
        "quantizer": kind == "cuda" and quantised_float16,
    }
    return [name for name, is_wanted in wanted.items() if is_wanted]


def ops_of(config: RunConfig) -> list[str]:
    """List the ops that this run loads; an engine without DeepSpeed loads none."""
    if not engine_of(config).loads_ops:
        return []
    return ops_needed(
        config.offload.device,
        quantised_float16=(config.quantiser == "deepspeed" and config.dtype.unpacks_to_float16),
        use_gds=config.offload.use_gds,
    )


def all_ops() -> list[str]:
    """List the ops of every offload target here; quantizer and gds are asked for by name."""
    return ops_needed("nvme")
