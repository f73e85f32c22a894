"""List the small models that calibration runs.

Their kernels cost next to nothing, so their time is the fixed cost of a layer, an element, a step.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from zinfer.config import BatchConfig, ModelConfig

FAMILIES = ("llama", "opt", "bloom", "mixtral")
LAYERS, SOME_LAYERS, FEW_LAYERS = 8, 4, 2
FEW_LAYERS_FAMILIES = ("llama", "opt")
ROUNDS = 3
"""Most runs of one job. A neighbour on the processor slows a whole tiny job, for up to a second."""
AGREEMENT = 1.07
"""A job is run again until its two fastest runs are within this ratio."""
HIDDEN = 64
"""So small that a layer is nothing but its fixed cost."""
ELEMENT_HIDDEN = 256
"""Large enough for a prefill to show its elementwise work."""
STEPS = BatchConfig(batch_size=2, prompt_tokens=32, new_tokens=12, warmup=1, repeats=3)
PREFILL = BatchConfig(batch_size=4, prompt_tokens=128, new_tokens=2, warmup=1, repeats=3)
MIDDLE_MODELS = (("llama", 6, 640), ("opt", 8, 576))
"""(family, layers, hidden size) of models that the caches do not hold."""
WIDE_MODEL = ("llama", 2, 1536)
"""With matrices of 9 to 26 MB in float32, where those of the others have 1.3 to 5."""
MIDDLE = tuple(
    BatchConfig(batch_size=rows, prompt_tokens=8, new_tokens=6, warmup=1, repeats=2)
    for rows in (1, 16)
)


def calibrated_dtypes(device_dtypes: Collection[str]) -> tuple[str, ...]:
    """Return at most two types: full precision, and the 16 bits that this device computes in."""
    return tuple(kind for kind in ("float32", "bfloat16", "float16") if kind in device_dtypes)[:2]


@dataclass(frozen=True, kw_only=True)
class Job:
    """One small model in one mode."""

    family: str
    mode: str
    dtype: str
    layers: int = LAYERS
    hidden: int = HIDDEN
    batch: BatchConfig = STEPS
    leaf: bool = True
    """ZeRO-3 fetches whole layers; else module by module."""
    rounds: int = ROUNDS
    """Most runs; fewer where the usual time counts and not the fastest, or matters less."""


def small_model(family: str, layers: int, hidden: int) -> ModelConfig:
    """Return a model of that family whose weights are small: its cost is mostly not arithmetic."""
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
        "opt": {**shared, "word_embed_proj_dim": hidden, "ffn_dim": hidden * 15 // 4,
                "max_position_embeddings": 512},
        "bloom": shared,
        "mixtral": {**shared, **gated, "intermediate_size": hidden * 11 // 8,
                    "num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None},
    }  # fmt: skip
    name = f"calibration-{family}-{layers}x{hidden}"
    return ModelConfig(
        name=name, model_type=family, overrides=overrides[family], checkpoint_dtype="float32"
    )


def jobs(dtypes: tuple[str, ...], *, nvme: bool, cpu_offload: bool) -> Iterator[Job]:
    """Yield the jobs to run.

    Without an accelerator offload=cpu uses the partition itself and costs what offload=none costs.
    """
    for dtype in dtypes:
        for family in FEW_LAYERS_FAMILIES:
            yield Job(family=family, mode="resident", dtype=dtype, layers=FEW_LAYERS)
        for family in FAMILIES:
            yield Job(family=family, mode="resident", dtype=dtype)
            yield Job(
                family=family,
                mode="resident",
                dtype=dtype,
                layers=SOME_LAYERS,
                hidden=ELEMENT_HIDDEN,
                batch=PREFILL,
                rounds=2,
            )
    plain = dtypes[0]  # what ZeRO-3 adds is Python: the type does not matter
    for mode in ("none", *(("cpu",) if cpu_offload else ())):
        for family in FEW_LAYERS_FAMILIES:
            yield Job(family=family, mode=mode, dtype=plain, layers=FEW_LAYERS)
        for family in FAMILIES:
            yield Job(family=family, mode=mode, dtype=plain)
        for family in FEW_LAYERS_FAMILIES:
            yield Job(family=family, mode=mode, dtype=plain, layers=SOME_LAYERS, leaf=False)
    for dtype in dtypes:  # of more weights than the caches hold
        for batch, rounds in zip(MIDDLE, (2, 1), strict=True):
            for family, layers, hidden in MIDDLE_MODELS:
                yield Job(
                    family=family,
                    mode="none",
                    dtype=dtype,
                    layers=layers,
                    hidden=hidden,
                    batch=batch,
                    rounds=rounds,
                )
    if nvme:
        yield Job(family="opt", mode="nvme", dtype=plain, rounds=1)  # too small to be swapped
        for family, layers, hidden in (*MIDDLE_MODELS, WIDE_MODEL):
            yield Job(
                family=family,
                mode="nvme",
                dtype=plain,
                layers=layers,
                hidden=hidden,
                batch=MIDDLE[0],
                rounds=2,
            )
        family, layers, hidden = WIDE_MODEL
        yield Job(
            family=family,
            mode="none",
            dtype=plain,
            layers=layers,
            hidden=hidden,
            batch=MIDDLE[0],
            rounds=2,
        )  # to compare with


def to_run_again(chosen: Iterable[Job], calm_s: Mapping[Job, Sequence[float]]) -> list[Job]:
    """Return jobs to run again: run once, or with two fastest runs that do not agree yet.

    Args:
        calm_s: seconds that each job's runs took so far.
    """
    return [
        job for job in chosen if len(calm_s[job]) < job.rounds and not _agree(sorted(calm_s[job]))
    ]


def _agree(times_s: Sequence[float]) -> bool:
    return len(times_s) > 1 and times_s[1] <= AGREEMENT * times_s[0]
