"""Count host memory that is no tensor: Python, its libraries, the loader, what glibc keeps.

The constants were measured on Linux x86-64 with torch 2.13 (CPU), transformers 5.23 and DeepSpeed
0.19.8. A calibration profile replaces the first two by this machine's.
"""

from __future__ import annotations

from dataclasses import dataclass

from zinfer.config import ITEMSIZE_BYTES, RunConfig
from zinfer.config.engines import engine_of
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import ModelSpec
from zinfer.model.weights.local import checkpoint_folder
from zinfer.plan.zero_layout import ZeroLayout
from zinfer.units import MIB

IMPORTED_RSS_BYTES = 500 * MIB
"""Resident memory of a fresh worker with torch, transformers and deepspeed imported."""
GROWTH_BYTES = {"resident": 20 * MIB, "none": 48 * MIB, "cpu": 48 * MIB, "nvme": 64 * MIB}
"""Bytes that loading and running a tiny model adds: kernels, process group, DeepSpeed's ops."""
DUMMY_POOL_NUMEL = (1 << 22) + 4099
"""Random values that weights/dummy.py tiles over the model; made in float32."""
KEPT_FREE = {"float32": (2.4, 3.5), "other": (1.6, 1.8)}
"""ZeRO-3 on the CPU: peak over what is alive, (working memory, KV cache).

Each step replaces every cache tensor by one that is a token longer. DeepSpeed's small objects
between them keep freed memory from going back to the system.
"""
KEPT_FREE_RESIDENT = (1.4, 2.2)
LARGEST_KEPT = 0.6
"""Share of the largest parameter that ZeRO-3's loading leaves in the heap, on average."""
KEPT_AFTER_QUANTISING = 80 * MIB
"""Bytes that quantising leaves besides: 60 to 100 MiB from 125M to 560M parameters."""
LARGEST_WHILE_LOADING = {"untied": 1.6, "tied": 2.3}
"""Copies of the largest parameter alive while ZeRO-3 partitions it, beside its partition.

A tied head exists untied for a moment.
"""


@dataclass(frozen=True, kw_only=True)
class ProcessMemory:
    """Host memory of one worker before it holds a model."""

    imported_bytes: int
    growth_bytes: int


def mode_of(config: RunConfig) -> str:
    """Name the mode that decides the fixed costs of a run: resident, none, cpu or nvme."""
    return config.offload.device if engine_of(config).zero3 else "resident"


def process_memory(config: RunConfig, profile: CalibrationProfile | None) -> ProcessMemory:
    """Count the memory of a worker before it holds a model.

    A forked worker touches the pages that a fresh one has read, and counts the same.
    """
    mode = mode_of(config)
    imported = profile.imported_rss_bytes if profile else IMPORTED_RSS_BYTES
    growth = (profile.growth_bytes if profile else {}).get(mode, GROWTH_BYTES[mode])
    return ProcessMemory(imported_bytes=imported, growth_bytes=growth)


def kept_free_factor(config: RunConfig, spec: ModelSpec) -> tuple[float, float]:
    """Return peak over what is alive, (working memory, KV cache), without an accelerator."""
    if not engine_of(config).zero3:
        return KEPT_FREE_RESIDENT
    return KEPT_FREE.get(spec.dtype, KEPT_FREE["other"])


def kept_after_loading(config: RunConfig, layout: ZeroLayout) -> int:
    """Return the bytes that the loader frees and that are not given back to the system."""
    if not engine_of(config).zero3:
        return 0
    quantised = 0 if config.dtype.bits is None else KEPT_AFTER_QUANTISING
    return int(LARGEST_KEPT * layout.largest_numel * layout.itemsize_bytes) + quantised


def loading_bytes(config: RunConfig, spec: ModelSpec, layout: ZeroLayout) -> int:
    """Return the bytes alive at the loader's worst moment and gone afterwards, on one rank."""
    size = ITEMSIZE_BYTES[spec.dtype]
    pool = DUMMY_POOL_NUMEL * (size if size == 4 else 4) if config.weights == "dummy" else 0
    if not engine_of(config).zero3:
        return pool
    copies = LARGEST_WHILE_LOADING["tied" if spec.tied_embeddings else "untied"]
    return pool + int(copies * layout.largest_numel * size)


def mapped_bytes(config: RunConfig, spec: ModelSpec) -> int:
    """Return the bytes of the checkpoint's mapped files once all were read, on the first rank.

    transformers maps every shard until the end. Files that are not on this machine count with the
    size of the published type.
    """
    if config.weights == "dummy":
        return 0
    folder = checkpoint_folder(config.model)
    files = list(folder.glob("*.safetensors")) if folder else []
    if files:
        return sum(file.stat().st_size for file in files)
    return spec.num_parameters * ITEMSIZE_BYTES[config.model.checkpoint_dtype or spec.dtype]
