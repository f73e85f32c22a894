"""Measure decode attention on the host, alone and inside whole runs. `make bench-kv`.

The first table gives keys and values read per second as a share of the read bandwidth that is
measured beside it, in turn. Buffers rotate over more memory than the processor's caches hold.
The second gives decode tokens/s of whole runs with each placement of the KV cache, in turn, and how
long their prefill takes. It begins with the smallest and says how long all may take; what memory
does not hold is a dash, with the reason on stderr.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from heading import heading

import zinfer
from zinfer.machine.memory import host_available_bytes
from zinfer.model.spec import ModelSpec
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
OFFLOADED = "transformers' offloaded"
PLACEMENTS = {
    "device": ["kv_cache=device"],
    OFFLOADED: ["kv_cache=device"],
    "host": ["kv_cache=host"],
    "host, 8 bits": ["kv_cache=host", "kv_cache.bits=8"],
    "host, 4 bits": ["kv_cache=host", "kv_cache.bits=4"],
    "host_attention": ["kv_cache=host_attention"],
    "host_attention, 8 bits": ["kv_cache=host_attention", "kv_cache.bits=8"],
    "host_attention, 4 bits": ["kv_cache=host_attention", "kv_cache.bits=4"],
}
NEW_TOKENS = 16
RUN = [
    "dtype=bfloat16",
    "engine=resident",
    f"batch.new_tokens={NEW_TOKENS}",
    "batch.warmup=0",
    "batch.repeats=1",
]
SMALL = ["model=tiny-llama", "batch.batch_size=1", "batch.prompt_tokens=8"]
START_S = 14.0
"""Seconds of a run before its prefill: imports, random weights."""
READ_SHARE = 0.12
"""Share of the read bandwidth at which placements read their caches, on average, on two cores."""


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


def decode_and_prefill(folder: Path, name: str, overrides: list[str]) -> tuple[float, float] | None:
    """Run one job; its decode tokens/s and prefill seconds, or None where it did not end well."""
    words = [*overrides, *PLACEMENTS[name], *RUN]
    zinfer = [sys.executable, "-m", "zinfer", *words, "tracking=none", "format=json"]
    offloaded = [sys.executable, str(HERE / "offloaded_cache.py"), *words]
    done = subprocess.run(
        offloaded if name == OFFLOADED else zinfer,
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    lines = done.stdout.strip()
    result = json.loads(lines if name != OFFLOADED else lines.splitlines()[-1]) if lines else {}
    metrics = result.get("metrics", result)
    if "decode_tokens_per_s" not in metrics:
        reason = result.get("reason") or done.stderr[-500:]
        print(f"{name}: {' '.join(overrides)}: {reason}", file=sys.stderr)
        return None
    return float(metrics["decode_tokens_per_s"]), float(metrics["prefill_s"])


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One line of the table of runs."""

    model: str
    spec: ModelSpec
    rows: int
    prompt_tokens: int

    @property
    def overrides(self) -> list[str]:
        """Return the words that choose the model and its batch."""
        batch = [f"batch.batch_size={self.rows}", f"batch.prompt_tokens={self.prompt_tokens}"]
        return [*MODELS[self.model], *batch]

    def seconds(self, flops_per_s: float, bytes_per_s: float) -> float:
        """Estimate one run from the rates of a matrix product and of reading memory."""
        values = sum(layer.values_per_token for layer in self.spec.kv_layers or ())
        kv_bytes = 2 * values * self.rows * self.prompt_tokens
        if kv_bytes > (host_available_bytes() or sys.maxsize):
            return START_S  # refused
        step_s = (2 * self.spec.num_parameters + kv_bytes / READ_SHARE) / bytes_per_s
        flops = 2 * self.spec.num_parameters * self.rows * self.prompt_tokens
        return START_S + flops / flops_per_s + NEW_TOKENS * step_s


def cells_of(models: list[str], batches: list[int], lengths: list[int]) -> list[Cell]:
    """List the lines; a prompt ends where the model's positions leave room for the new tokens."""
    cells = []
    for model in models:
        spec = zinfer.model_spec(zinfer.compose(overrides=[*MODELS[model], *RUN]))
        most = (spec.max_positions or sys.maxsize) - NEW_TOKENS
        for batch, length in itertools.product(batches, lengths):
            cells.append(Cell(model=model, spec=spec, rows=batch, prompt_tokens=min(length, most)))
    return cells


def run_table(cells: list[Cell], rounds: int, names: list[str]) -> None:
    """Print decode tokens/s of each placement; speed and prefill also as ratios to the device."""
    with tempfile.TemporaryDirectory(prefix="bench-kv-", dir=Path.cwd()) as scratch:
        folder = Path(scratch)
        if OFFLOADED in names and decode_and_prefill(folder, OFFLOADED, SMALL) is None:
            names = [name for name in names if name != OFFLOADED]
            print(f"\n{OFFLOADED} cache does not run here; the reason is on stderr")
        say_how_long(cells, rounds * len(names))
        print("\n| model | rows | prompt + new tokens | " + " | ".join(names) + " |")
        print("| --- | --- | --- |" + " --- |" * len(names))
        for cell in cells:
            found: dict[str, list[tuple[float, float]]] = {name: [] for name in names}
            for _ in range(rounds):
                for name in names:
                    measured = decode_and_prefill(folder, name, cell.overrides)
                    if measured is not None:
                        found[name].append(measured)
            print(row(cell, found), flush=True)


def say_how_long(cells: list[Cell], runs_of_each: int) -> None:
    """Estimate the minutes of all runs."""
    matrix = torch.randn(2048, 2048).bfloat16()
    timed(lambda _: matrix @ matrix, 1)
    flops_per_s = 2 * 2048**3 / timed(lambda _: matrix @ matrix, 3)
    memory = torch.ones(ROTATED_BYTES // 8, dtype=torch.int64)
    bytes_per_s = memory.nbytes / timed(lambda _: memory.sum(), 3)
    seconds = runs_of_each * sum(cell.seconds(flops_per_s, bytes_per_s) for cell in cells)
    count = len(cells) * runs_of_each
    print(f"\n{count} runs, about {seconds / 60:.0f} minutes", flush=True)


def row(cell: Cell, found: dict[str, list[tuple[float, float]]]) -> str:
    """Write a line of the table of runs.

    A cell has the decode tokens/s; then, as ratios to the cache on the device, these tokens/s with
    their lowest and highest round, and the prefill's seconds.
    """
    plain = found.get("device", [])
    cells = []
    for name, measured in found.items():
        if not measured:
            cells.append("-")
            continue
        text = f"{statistics.median(rate for rate, _ in measured):.1f}"
        if name != "device" and len(plain) == len(measured):
            faster = [ours[0] / theirs[0] for ours, theirs in zip(measured, plain, strict=True)]
            slower = [ours[1] / theirs[1] for ours, theirs in zip(measured, plain, strict=True)]
            text += f" ({statistics.median(faster):.2f}x, {min(faster):.2f} to {max(faster):.2f}; "
            text += f"prefill {statistics.median(slower):.2f}x)"
        cells.append(text)
    shape = f"{cell.rows} | {cell.prompt_tokens} + {NEW_TOKENS}"
    return f"| {cell.model} | {shape} | " + " | ".join(cells) + " |"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "runs"), help="one of the two tables")
    parser.add_argument("--repeats", type=int, default=5, help="of each kernel, in turn")
    parser.add_argument("--rounds", type=int, default=1, help="of each run, in turn")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to measure")
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--placements", nargs="*", default=list(PLACEMENTS), choices=PLACEMENTS)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="*", default=[512, 1024, 2048])
    arguments = parser.parse_args()
    print(heading(f"{os.cpu_count()} cores"))
    if arguments.only != "runs":
        shapes = [SHAPES[at] for at in arguments.shapes] if arguments.shapes else SHAPES
        kernel_table(arguments.repeats, arguments.threads, shapes)
    if arguments.only != "kernels":
        cells = cells_of(arguments.models, arguments.batches, arguments.lengths)
        run_table(cells, arguments.rounds, arguments.placements)


if __name__ == "__main__":
    main()
