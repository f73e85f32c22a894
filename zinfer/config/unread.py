"""Find settings that were typed and that this run does not read.

Such a setting is mostly half of what was meant: `batch.prompt_file=my.txt` without
`batch.prompt=file` measures random tokens. So it is said. In a sweep some jobs read what others do
not, and nothing is said there. problems.py refuses what contradicts another setting.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from zinfer.config.tasks import task_of

if TYPE_CHECKING:
    from zinfer.config.run_config import RunConfig


@dataclass(frozen=True)
class Read:
    """Settings that are read under one condition only."""

    names: tuple[str, ...]
    condition: Callable[[RunConfig], bool]
    by: str
    """What reads them, in a few words."""
    instead: str
    """The override under which they are read."""


def _has_codes(config: RunConfig) -> bool:
    kv = config.kv_cache
    return kv.is_offloaded and min(kv.bits_of_keys, kv.bits_of_values) < 16


def _has_kv_kernel(config: RunConfig) -> bool:
    return config.kv_cache.placement == "host_attention" or _has_codes(config)


READ = (
    Read(
        ("batch.prompt_file",),
        lambda config: config.batch.prompt == "file",
        "batch.prompt=file",
        "batch.prompt=file",
    ),
    Read(
        ("batch.prompt_text",),
        lambda config: config.batch.prompt == "text",
        "batch.prompt=text",
        "batch.prompt=text",
    ),
    Read(
        ("batch.target_relative_error",),
        lambda config: config.batch.max_repeats is not None,
        "batch.max_repeats",
        "batch.max_repeats=100",
    ),
    Read(
        ("quality.tokens", "quality.min_agreement", "quality.max_perplexity_ratio"),
        lambda config: config.quality.enabled is not False,
        "runs that are scored",
        "quality.enabled=true",
    ),
    Read(
        (
            "offload.nvme_path",
            "offload.buffer_numel",
            "offload.buffer_count",
            "offload.huge_pages",
            "zero.aio_block_size_bytes",
            "zero.aio_queue_depth",
            "zero.aio_intra_op_parallelism",
        ),
        lambda config: config.offload.device == "nvme",
        "offload=nvme",
        "offload=nvme",
    ),
    Read(
        ("offload.pin_memory",),
        lambda config: config.offload.device != "none",
        "offload=cpu and offload=nvme",
        "offload=cpu",
    ),
    Read(
        (
            "dtype.group_size",
            "dtype.symmetric",
            "dtype.keep",
            "dtype.rounding",
            "dtype.activation_bits",
        ),
        lambda config: config.dtype.bits is not None,
        "dtype=int8 and dtype=int4",
        "dtype=int4",
    ),
    Read(("dtype.eight_bits",), lambda config: config.dtype.bits == 4, "dtype=int4", "dtype=int4"),
    Read(
        ("kv_cache.group_size",),
        lambda config: _has_codes(config) or not config.kv_cache.is_offloaded,
        "keys and values in 8 or 4 bits",
        "kv_cache.bits=8",
    ),
    Read(
        ("kv_cache.kernel",),
        lambda config: _has_kv_kernel(config) or not config.kv_cache.is_offloaded,
        "kv_cache=host_attention, and keys and values in 8 or 4 bits",
        "kv_cache=host_attention",
    ),
    Read(
        ("model.gguf_file",),
        lambda config: config.model.source is not None,
        "model=custom",
        "model=custom model.source=/path/to/a/folder",
    ),
    Read(
        ("sweep.search_max_batch", "sweep.search_trials"),
        lambda config: config.sweep.search == "best_batch",
        "sweep.search=best_batch",
        "sweep.search=best_batch",
    ),
)
"""Settings that other settings switch on, with what reads them."""


def unread_settings(config: RunConfig, typed: Iterable[str]) -> list[str]:
    """Collect a sentence for each typed setting that this run does not read: what reads it.

    Args:
        typed: overrides as they were typed, `batch.seed=3`.
    """
    if not task_of(config).reads_model:
        return []
    names = dict.fromkeys(override.partition("=")[0].lstrip("+") for override in typed)
    return [
        f"{name} is set and not read: it is of {row.by}. Set {row.instead}, or drop {name}"
        for name in names
        for row in READ
        if name in row.names and not row.condition(config)
    ]
