"""Measure planning: a first plan with an empty cache, a grid of 1,000 points. `make bench-plan`.

Processor time of the process and its children, and wall time; one of the grid's models has experts.
"""

from __future__ import annotations

import argparse
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from zinfer.paths import cache_dir

FIRST = ("model=opt-175b", "offload=nvme", "hardware=a6000", "tracking=none")
UNCOUNTED = (*FIRST, "model.overrides.num_hidden_layers=95")
"""A 100B-class model that the catalogue does not hold."""
MODELS = ("opt-125m", "opt-13b", "opt-30b", "llama-3-8b", "deepseek-v3")
GRID = (
    f"model={','.join(MODELS)}",
    "offload=cpu,nvme",
    f"batch.batch_size={','.join(map(str, range(1, 101)))}",
    "dtype=float16",
)
POINTS = len(MODELS) * 2 * 100


def plan_times_s(cache: Path, *arguments: str) -> tuple[float, float]:
    """Run one `zinfer task=plan` with this cache folder, in a store of its own.

    Returns processor seconds and wall seconds.
    """
    command = [sys.executable, "-m", "zinfer", *arguments, "task=plan"]
    with tempfile.TemporaryDirectory() as folder:
        before, started_s = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env={**os.environ, "ZINFER_CACHE": str(cache)},
            capture_output=True,
            text=True,
            check=False,
        )
        wall_s, after = (
            time.perf_counter() - started_s,
            resource.getrusage(resource.RUSAGE_CHILDREN),
        )
    if done.returncode:
        sys.exit(done.stderr)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime, wall_s


def cold_times_s(*arguments: str) -> tuple[float, float]:
    """Measure the same with an empty cache."""
    with tempfile.TemporaryDirectory() as cache:
        return plan_times_s(Path(cache), *arguments)


def main() -> None:
    """Print a table in Markdown."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repeats", type=int, default=3)
    repeats = parser.parse_args().repeats
    in_catalogue = [cold_times_s(*FIRST) for _ in range(repeats)]
    uncounted = [cold_times_s(*UNCOUNTED) for _ in range(repeats)]
    with tempfile.TemporaryDirectory() as cache:
        published = [
            plan_times_s(Path(cache), "-m", *GRID, "hardware=a6000") for _ in range(repeats)
        ]
    detected = [
        plan_times_s(cache_dir(), "-m", *GRID, "hardware.accelerator=cpu", "launcher.omp_threads=1")
        for _ in range(repeats)
    ]
    print(f"| median of {repeats} | processor time | wall time | goal |")
    print("| --- | --- | --- | --- |")
    for name, times, goal in (
        ("first plan, a model of the catalogue", in_catalogue, "6 s of processor time"),
        ("first plan, a new 100B-class model", uncounted, "10 s"),
        (
            f"a grid of {POINTS:,} points over {len(MODELS)} models, a published box",
            published,
            "60 s",
        ),
        ("the same grid, this machine with its calibration", detected, "60 s"),
    ):
        cpu_s, wall_s = (statistics.median(column) for column in zip(*times, strict=True))
        print(f"| {name} | {cpu_s:.2f} s | {wall_s:.2f} s | {goal} |")


if __name__ == "__main__":
    main()
