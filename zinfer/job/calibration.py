"""List the small models that a calibration runs.

What they cost beyond their kernels is the fixed cost of a layer, of an element and of a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from zinfer.config import BatchConfig, ModelConfig

FAMILIES = ("llama", "opt", "bloom", "mixtral")
SPARSE_FAMILIES = ("mixtral",)
"""Families with experts; what they cost says nothing of families that were not measured."""
LAYERS, SOME_LAYERS, FEW_LAYERS = 8, 4, 2
FEW_LAYERS_FAMILIES = ("llama", "opt")
"""Families that also run with few layers, to find what a pass costs without any."""
ROUNDS = 3
"""A job runs at most so often, with the kernels between its first two runs.

A neighbour on the processor slows a tiny job as a whole, for up to a second.
"""
AGREEMENT = 1.07
"""A job is run again until its two calmest runs are as near as that."""
HIDDEN = 64
"""So small that a layer is nothing but its fixed cost."""
ELEMENT_HIDDEN = 256
"""Large enough for a prefill to show its elementwise work."""
STEPS = BatchConfig(batch_size=2, prompt_tokens=32, new_tokens=12, warmup=1, repeats=3)
PREFILL = BatchConfig(batch_size=4, prompt_tokens=128, new_tokens=2, warmup=1, repeats=3)
MIDDLE_MODELS = (("llama", 6, 640), ("opt", 8, 576))
"""(family, layers, hidden size) of models that the caches do not hold."""
WIDE_MODEL = ("llama", 2, 1536)
"""Its matrices have 9 to 26 MB in float32, where those of the others have 1.3 to 5."""
MIDDLE = tuple(
    BatchConfig(batch_size=rows, prompt_tokens=8, new_tokens=6, warmup=1, repeats=2)
    for rows in (1, 16)
)

ESSENTIAL = "fixed costs of two families"
LARGE, DISK = "models larger than the caches", "NVMe"
BY_MODULE, LARGE_BATCH = "fetching module by module", "larger batches"


def calibrated_dtypes(device_dtypes: Collection[str]) -> tuple[str, ...]:
    """Return at most two types: full precision, and the 16 bits that this device computes in."""
    return tuple(kind for kind in ("float32", "bfloat16", "float16") if kind in device_dtypes)[:2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One small model in one mode."""

    family: str
    mode: Literal["resident", "none", "cpu", "nvme"]
    """resident is plain transformers; the others are ZeRO-3 with that offload."""
    dtype: str
    layers: int = LAYERS
    hidden: int = HIDDEN
    batch: BatchConfig = STEPS
    leaf: bool = True
    """ZeRO-3 fetches whole layers; else it fetches module by module."""
    rounds: int = ROUNDS
    """Runs at most so often. Fewer where a usual run counts and not a calm one."""
    group: str = field(default=ESSENTIAL, compare=False)
    """What is not known without this job, in words. Jobs of a group are run together or not."""


def small_model(family: str, layers: int, hidden: int) -> ModelConfig:
    """Return a model of that family with small weights, whose cost is mostly not arithmetic."""
    heads = max(1, hidden // 64)
    shared = {
        "hidden_size": hidden,
        "vocab_size": 512,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }
    gated = {
        "num_key_value_heads": max(1, heads // 2),
        "max_position_embeddings": 1024,
        "tie_word_embeddings": False,
    }
    overrides: dict[str, dict[str, Any]] = {
        "llama": {**shared, **gated, "intermediate_size": hidden * 11 // 4},
        "opt": {
            **shared,
            "word_embed_proj_dim": hidden,
            "ffn_dim": hidden * 15 // 4,
            "max_position_embeddings": 512,
        },
        "bloom": shared,
        "mixtral": {
            **shared,
            **gated,
            "intermediate_size": hidden * 11 // 8,
            "num_local_experts": 4,
            "num_experts_per_tok": 2,
            "sliding_window": None,
        },
    }
    name = f"calibration-{family}-{layers}x{hidden}"
    return ModelConfig(
        name=name, model_type=family, overrides=overrides[family], checkpoint_dtype="float32"
    )


def jobs(dtypes: tuple[str, ...], *, nvme: bool, cpu_offload: bool) -> list[Job]:
    """Return all jobs of a calibration.

    On a machine without an accelerator, offload=cpu uses the partition itself and costs what
    offload=none costs.

    Args:
        dtypes: the first is the one in which ZeRO-3 runs; what it adds is Python, whatever the
            type.
        nvme: measure offload=nvme too.
        cpu_offload: measure offload=cpu apart from offload=none.
    """
    plain = dtypes[0]
    found = [job for dtype in dtypes for job in _resident_jobs(dtype, essential=dtype == plain)]
    for mode in ZERO_MODES if cpu_offload else ZERO_MODES[:1]:
        found += _zero_jobs(mode, plain)
    for dtype in dtypes:
        found += _large_jobs(dtype, essential=dtype == plain)
    return [*found, *(_nvme_jobs(plain) if nvme else ())]


ZERO_MODES: tuple[Literal["none", "cpu"], ...] = ("none", "cpu")


def _group(family: str, dtype: str, *, essential: bool) -> str:
    """Return the group of a family's jobs: two families are enough to predict any."""
    if not essential:
        return dtype
    return ESSENTIAL if family in FEW_LAYERS_FAMILIES else f"the family {family}"


def _resident_jobs(dtype: str, *, essential: bool) -> Iterator[Job]:
    """Yield plain transformers: an operation, an element, and the loop without layers."""
    for family in FEW_LAYERS_FAMILIES:
        group = _group(family, dtype, essential=essential)
        yield Job(family=family, mode="resident", dtype=dtype, layers=FEW_LAYERS, group=group)
    for family in FAMILIES:
        group = _group(family, dtype, essential=essential)
        yield Job(family=family, mode="resident", dtype=dtype, group=group)
        yield Job(
            family=family,
            mode="resident",
            dtype=dtype,
            layers=SOME_LAYERS,
            hidden=ELEMENT_HIDDEN,
            batch=PREFILL,
            rounds=2,
            group=group,
        )


def _zero_jobs(mode: Literal["none", "cpu"], dtype: str) -> Iterator[Job]:
    """Yield ZeRO-3 on the same models: what it adds to a pass, a layer and a parameter."""
    for family in FEW_LAYERS_FAMILIES:
        yield Job(family=family, mode=mode, dtype=dtype, layers=FEW_LAYERS)
    for family in FAMILIES:
        group = _group(family, dtype, essential=True)
        yield Job(family=family, mode=mode, dtype=dtype, group=group)
    for family in FEW_LAYERS_FAMILIES:
        yield Job(
            family=family,
            mode=mode,
            dtype=dtype,
            layers=SOME_LAYERS,
            leaf=False,
            group=BY_MODULE,
        )


def _large_jobs(dtype: str, *, essential: bool) -> Iterator[Job]:
    """Yield models of more weights than the caches hold."""
    for batch, rounds, group in zip(MIDDLE, (2, 1), (LARGE, LARGE_BATCH), strict=True):
        for family, layers, hidden in MIDDLE_MODELS:
            yield Job(
                family=family,
                mode="none",
                dtype=dtype,
                layers=layers,
                hidden=hidden,
                batch=batch,
                rounds=rounds,
                group=group if essential else dtype,
            )


def _nvme_jobs(dtype: str) -> Iterator[Job]:
    """Yield models that are swapped, one that is too small for it, and one to compare with."""
    yield Job(family="opt", mode="nvme", dtype=dtype, rounds=1, group=DISK)
    modes: tuple[tuple[Literal["nvme", "none"], tuple[str, int, int]], ...] = (
        *(("nvme", model) for model in (*MIDDLE_MODELS, WIDE_MODEL)),
        ("none", WIDE_MODEL),
    )  # fmt: skip
    for mode, (family, layers, hidden) in modes:
        yield Job(
            family=family,
            mode=mode,
            dtype=dtype,
            layers=layers,
            hidden=hidden,
            batch=MIDDLE[0],
            rounds=2,
            group=DISK,
        )


def groups_by_need(chosen: Sequence[Job], dtypes: Sequence[str]) -> list[str]:
    """Return the groups of these jobs, the one that matters most first.

    Predictions need the essential ones. Then come large models, which are what is offloaded, and
    NVMe, which needs them to compare with; then the other type, more families, and details.
    """
    order = [ESSENTIAL, LARGE, DISK, *dtypes]
    order += [f"the family {family}" for family in FAMILIES] + [BY_MODULE, LARGE_BATCH]
    return [group for group in order if any(job.group == group for job in chosen)]


def to_run_again(chosen: Iterable[Job], calm_s: Mapping[Job, Sequence[float]]) -> list[Job]:
    """Return the jobs whose two calmest runs do not agree yet, and that may run again.

    Args:
        calm_s: seconds of a calm pass in each run of each job so far.
    """
    return [
        job for job in chosen if len(calm_s[job]) < job.rounds and not _agree(sorted(calm_s[job]))
    ]


def _agree(times_s: Sequence[float]) -> bool:
    return len(times_s) > 1 and times_s[1] <= AGREEMENT * times_s[0]
