"""Keep what a trial measured in the cache folder, for the next run of the same products here.

So runs of one configuration on one machine multiply alike, and their sums are rounded alike.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict

import torch

from zinfer.job.records import read_record, write_json
from zinfer.machine.cpp_library import PRODUCTS, build_library
from zinfer.paths import cache_dir
from zinfer.plan.own_products import Shape
from zinfer.worker.skinny.trial import Trial

FOLDER = "linear"
"""In zinfer's cache."""


def situation(shapes: Mapping[Shape, int], rows: int, dtype: torch.dtype, *, ranks: int) -> str:
    """Hash all that the times depend on: products, threads, ranks, PyTorch, kernel and processor.

    The library's name stands for its source, its compiler and the processor.
    """
    parts = (
        build_library(PRODUCTS).name, torch.__version__, torch.get_num_threads(), ranks, rows,
        str(dtype), sorted(shapes.items()),
    )  # fmt: skip
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def kept_trials(key: str) -> list[Trial] | None:
    """Read what an earlier run kept; None: nothing that can be read."""
    return read_record(cache_dir() / FOLDER / f"{key}.json", list[Trial])


def keep_trials(key: str, found: Sequence[Trial]) -> None:
    """Keep a measurement, where the cache folder can be written: else the next run measures."""
    folder = cache_dir() / FOLDER
    with contextlib.suppress(OSError):
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", [asdict(each) for each in found])
