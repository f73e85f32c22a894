"""Measure decode attention on the host, alone and inside whole runs. `make bench-kv`.

The first table gives keys and values read per second as a share of the read bandwidth that is
measured beside it, in turn. Buffers rotate over more memory than the processor's caches hold.
The second gives decode tokens/s of whole runs with each placement of the KV cache, in turn, and how
long their prefill takes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from zinfer import __version__
from zinfer.machine.processor import cpu_model_name
from zinfer.worker.kv_cache.codes import quantise
from zinfer.worker.kv_cache.kernel import Rows, Scoring, by_sdpa, compiled, library

HERE = Path(__file__).parent
ROTATED_BYTES = 256 << 20
"""Memory over which copies of one problem are spread."""
SHAPES = [  # query heads, KV heads, tokens, rows
    (32, 32, 512, 1),
    (32, 32, 512, 32),
    (32, 32, 2048, 1),
    (32, 32, 2048, 8),
    (32, 32, 8192, 1),
    (32, 4, 2048, 1),
    (32, 4, 2048, 32),
    (32, 4, 8192, 8),
]
DIM = 128
KINDS: list[tuple[str, torch.dtype | int]] = [
    ("float32", torch.float32),
    ("bfloat16", torch.bfloat16),
    ("8 bits", 8),
    ("4 bits", 4),
]
LLAMA = [
    "model=tiny-llama",
    *(
        f"model.overrides.{name}={value}"
        for name, value in {
            "hidden_size": 2048,
            "intermediate_size": 5632,
            "num_hidden_layers": 12,
            "num_attention_heads": 32,
            "num_key_value_heads": 4,
            "vocab_size": 32000,
            "max_position_embeddings": 4096,
        }.items()
    ),
]
MODELS = {"opt-125m": ["model=opt-125m"], "opt-1.3b": ["model=opt-1.3b"], "LLaMA, 32/4": LLAMA}
PLACEMENTS = {
    "device": ["kv_cache=device"],
    "host": ["kv_cache=host"],
    "host_attention": ["kv_cache=host_attention"],
    "host_attention, 8 bits": ["kv_cache=host_attention", "kv_cache.bits=8"],
    "host_attention, 4 bits": ["kv_cache=host_attention", "kv_cache.bits=4"],
}


def stored(values: torch.Tensor, kind: torch.dtype | int) -> Rows:
    """Store values [rows, heads, tokens, DIM] in a type, or in so many bits."""
    if isinstance(kind, torch.dtype):
        return Rows(data=values.to(kind).contiguous())
    codes, scales = quantise(values, kind, 64)
    return Rows(data=codes.contiguous(), scales=scales.contiguous(), bits=kind, group_size=64)


def copied(rows: Rows) -> Rows:
    """Return the same rows in memory of their own."""
    scales = None if rows.scales is None else rows.scales.clone()
    return replace(rows, data=rows.data.clone(), scales=scales)


def bytes_of(*rows: Rows) -> int:
    """Return the bytes of keys and values, with their scales."""
    parts = [part for each in rows for part in (each.data, each.scales) if part is not None]
    return sum(part.numel() * part.element_size() for part in parts)


def timed(run: Callable[[int], object], turns: int) -> float:
    """Return the seconds of one call, the mean over as many as rotate through memory."""
    started_s = time.perf_counter()
    for turn in range(turns):
        run(turn)
    return (time.perf_counter() - started_s) / turns


def kernel_table(repeats: int, threads_tried: list[int], shapes: list[tuple[int, ...]]) -> None:
    """Print one row per shape and number of threads."""
    lib = library()
    if isinstance(lib, str):
        sys.exit(f"the kernel is not there: {lib}")
    print(f"\nvectors of {lib.zinfer_vector_bits()} bits; share of the read bandwidth, ")
    print("and how many times as fast as PyTorch's attention in the same type\n")
    kinds = " | ".join(name for name, _ in KINDS)
    print(f"| query/KV heads | tokens | rows | threads | GB/s read | {kinds} |")
    print("| --- | --- | --- | --- | --- |" + " --- |" * len(KINDS))
    big = torch.ones(ROTATED_BYTES // 8, dtype=torch.int64)
    for heads, kv_heads, tokens, rows in shapes:
        for threads in threads_tried:
            torch.set_num_threads(threads)
            cells = shape_cells(heads, kv_heads, tokens, rows, repeats, big)
            shown = " | ".join(cells)
            print(f"| {heads}/{kv_heads} | {tokens} | {rows} | {threads} | {shown} |", flush=True)


def shape_cells(
    heads: int, kv_heads: int, tokens: int, rows: int, repeats: int, big: torch.Tensor
) -> list[str]:
    """Measure bandwidth, our kernel and PyTorch's in turn; the cells of one row of the table."""
    torch.manual_seed(0)
    query = torch.randn(rows, heads, DIM)
    how = Scoring(scale=DIM**-0.5)
    values = torch.randn(rows, kv_heads, tokens, DIM)
    copies = {}
    for name, kind in KINDS:
        one = stored(values, kind)
        count = max(2, ROTATED_BYTES // bytes_of(one, one))
        copies[name] = [(copied(one), copied(one)) for _ in range(count)]
    rates: dict[str, list[float]] = {name: [] for name, _ in KINDS}
    faster: dict[str, list[float]] = {name: [] for name, _ in KINDS}
    bandwidths = []
    for _ in range(repeats):
        bandwidth = big.nbytes / timed(lambda _: big.sum(), 2)
        bandwidths.append(bandwidth)
        for name, kind in KINDS:
            pairs = copies[name]
            turns = max(2, len(pairs))
            typed = query.to(kind) if isinstance(kind, torch.dtype) else query

            def ours(turn: int, pairs: list = pairs, typed: torch.Tensor = typed) -> object:
                return compiled(typed, *pairs[turn % len(pairs)], tokens, how)

            def theirs(turn: int, pairs: list = pairs, typed: torch.Tensor = typed) -> object:
                return by_sdpa(typed, *pairs[turn % len(pairs)], tokens, how)

            ours(0)
            seconds = timed(ours, turns)
            rates[name].append(bytes_of(*pairs[0]) / seconds / bandwidth)
            if isinstance(kind, torch.dtype):
                faster[name].append(timed(theirs, 2) / seconds)
    cells = [f"{statistics.median(bandwidths) / 1e9:.1f}"]
    for name, _ in KINDS:
        share = f"{statistics.median(rates[name]):.2f}"
        times = f", {statistics.median(faster[name]):.1f}x" if faster[name] else ""
        cells.append(share + times)
    return cells


def decode_and_prefill(folder: Path, overrides: list[str]) -> tuple[float, float] | None:
    """Run one job; its decode tokens/s and prefill seconds, or None where it did not end well."""
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *overrides, "tracking=none", "format=json"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout)
    if result["status"] != "ok":
        print(f"{' '.join(overrides)}: {result['status']}: {result.get('reason')}", file=sys.stderr)
        return None
    metrics = result["metrics"]
    return float(metrics["decode_tokens_per_s"]), float(metrics["prefill_s"])


def run_table(models: list[str], batches: list[int], lengths: list[int], rounds: int) -> None:
    """Print decode tokens/s of each placement; speed and prefill also as ratios to the device."""
    print("\n| model | rows | prompt + new tokens | " + " | ".join(PLACEMENTS) + " |")
    print("| --- | --- | --- |" + " --- |" * len(PLACEMENTS))
    with tempfile.TemporaryDirectory(prefix="bench-kv-", dir=Path.cwd()) as scratch:
        for model in models:
            for batch in batches:
                for length in lengths:
                    found: dict[str, list[tuple[float, float]]] = {n: [] for n in PLACEMENTS}
                    for _ in range(rounds):
                        for name, placement in PLACEMENTS.items():
                            measured = decode_and_prefill(
                                Path(scratch),
                                [
                                    *MODELS[model],
                                    *placement,
                                    "dtype=bfloat16",
                                    f"batch.batch_size={batch}",
                                    f"batch.prompt_tokens={length}",
                                    "batch.new_tokens=16",
                                    "batch.warmup=0",
                                    "batch.repeats=1",
                                    "engine=resident",
                                ],
                            )
                            if measured is not None:
                                found[name].append(measured)
                    print(row(model, batch, length, found), flush=True)


def row(model: str, batch: int, length: int, found: dict[str, list[tuple[float, float]]]) -> str:
    """Write a line of the table of runs.

    A cell has the decode tokens/s; then, as ratios to the cache on the device, these tokens/s with
    their lowest and highest round, and the prefill's seconds.
    """
    plain = found["device"]
    cells = []
    for name, measured in found.items():
        if not measured:
            cells.append("-")
            continue
        cell = f"{statistics.median(rate for rate, _ in measured):.1f}"
        if name != "device" and len(plain) == len(measured):
            faster = [ours[0] / theirs[0] for ours, theirs in zip(measured, plain, strict=True)]
            slower = [ours[1] / theirs[1] for ours, theirs in zip(measured, plain, strict=True)]
            cell += f" ({statistics.median(faster):.2f}x, {min(faster):.2f} to {max(faster):.2f}; "
            cell += f"prefill {statistics.median(slower):.2f}x)"
        cells.append(cell)
    return f"| {model} | {batch} | {length} + 16 | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "runs"), help="one of the two tables")
    parser.add_argument("--repeats", type=int, default=5, help="of each kernel, in turn")
    parser.add_argument("--rounds", type=int, default=1, help="of each run, in turn")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to measure")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024])
    arguments = parser.parse_args()
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=HERE,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    print(f"zinfer {__version__}, commit {commit or 'unknown'}, {cpu_model_name()}, "
          f"{os.cpu_count()} cores")  # fmt: skip
    if arguments.only != "runs":
        shapes = [SHAPES[at] for at in arguments.shapes] if arguments.shapes else SHAPES
        kernel_table(arguments.repeats, arguments.threads, shapes)
    if arguments.only != "kernels":
        run_table(arguments.models, arguments.batches, arguments.lengths, arguments.rounds)


if __name__ == "__main__":
    main()
