"""Measure products with packed weights, alone and inside whole runs. `make bench-quantized`.

The first table times our compiled kernels and PyTorch's own against PyTorch's linear layer in
bfloat16, in turn. Copies of each matrix rotate over more memory than the processor's caches hold.
The second gives decode steps of whole runs with weights in bfloat16, int8 and int4, in turn; in
bfloat16 by PyTorch, and by whatever dtype.kernel=auto measures to be faster.
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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from heading import heading
from torch.nn.functional import linear

from zinfer.worker.kv_cache.codes import quantise
from zinfer.worker.quantised.kernel import multiply
from zinfer.worker.quantised.native import library
from zinfer.worker.skinny.product import skinny_linear

HERE = Path(__file__).parent
ROTATED_BYTES = 208 << 20
"""Memory over which copies of one matrix are spread."""
SHAPES = ((4096, 4096), (2048, 2048), (11008, 4096), (1024, 1024), (4096, 1024))
"""(out, in) of the matrices."""
ROWS = (1, 4, 8, 32)
GROUP_SIZE = 64
LLAMA_400M = [
    "model=tiny-llama",
    *(
        f"model.overrides.{name}={value}"
        for name, value in {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 24,
            "num_attention_heads": 16,
            "num_key_value_heads": 16,
            "vocab_size": 32000,
        }.items()
    ),
]
MODELS = {"LLaMA, 400M": LLAMA_400M, "OPT-1.3b": ["model=opt-1.3b"]}
EIGHT, SIXTEEN = "dtype.activation_bits=8", "dtype.activation_bits=16"
DTYPES = {
    "bfloat16": ["dtype=bfloat16", "dtype.kernel=torch"],
    "bfloat16, auto": ["dtype=bfloat16"],
    "int8": ["dtype=int8", "dtype.compute=bfloat16"],
    "int4": ["dtype=int4", "dtype.compute=bfloat16"],
    "int8, 8-bit activations": ["dtype=int8", "dtype.compute=bfloat16", EIGHT],
    "int4, 16-bit activations": ["dtype=int4", "dtype.compute=bfloat16", SIXTEEN],
}
"""Columns of the second table. The first is PyTorch's linear layer, which the others are over."""


@dataclass(frozen=True)
class Way:
    """One way to multiply a row block with one of several copies of a matrix.

    Attributes:
        run: takes the activations and the number of the copy.
        copies: how many there are.
        stored_bytes: bytes that one product reads.
    """

    run: Callable[[torch.Tensor, int], object]
    copies: int
    stored_bytes: int


def ways_for(out: int, inputs: int) -> dict[str, Way]:
    """Store one matrix in every form, as often as fills ROTATED_BYTES."""
    weight = torch.randn(out, inputs).mul_(0.02)
    plain = copies_of(weight.bfloat16())
    made = {
        "F.linear": Way(lambda x, at: linear(x, plain[at][0]), len(plain), 2 * weight.numel()),
        "own bfloat16": Way(
            lambda x, at: skinny_linear(x, plain[at][0]),
            len(plain),
            2 * weight.numel(),
        ),
    }
    for bits in (8, 4):
        packed = copies_of(*quantise(weight, bits, GROUP_SIZE))
        for activation_bits in (16, 8):
            name = f"own int{bits}" + (", 8-bit activations" if activation_bits == 8 else "")
            run = packed_product(packed, bits, activation_bits)
            made[name] = Way(run, len(packed), size_of(packed[0]))
    return made | pytorchs_ways(weight)


def packed_product(
    packed: list[tuple[torch.Tensor, ...]], bits: int, activation_bits: int
) -> Callable[[torch.Tensor, int], object]:
    """Multiply with one of these matrices by the compiled kernel."""

    def run(x: torch.Tensor, at: int) -> object:
        codes, scales = packed[at]
        return multiply(
            x, codes, scales,
            bits=bits, group_size=GROUP_SIZE, kernel="compiled", activation_bits=activation_bits,
        )  # fmt: skip

    return run


def pytorchs_ways(weight: torch.Tensor) -> dict[str, Way]:
    """List PyTorch's operators for packed weights; each has a scheme and a layout of its own."""
    out, inputs = weight.shape
    aten: Any = torch.ops.aten
    eight = copies_of(
        torch.randint(-128, 128, (out, inputs), dtype=torch.int8), torch.ones(out).bfloat16()
    )
    codes = torch.randint(0, 16, (out, inputs), dtype=torch.int32)
    four = copies_of(
        aten._convert_weight_to_int4pack_for_cpu(codes, 1),
        torch.ones(inputs // GROUP_SIZE, out, 2).bfloat16(),
    )
    return {
        "int8pack": Way(
            lambda x, at: aten._weight_int8pack_mm(x, *eight[at]), len(eight), size_of(eight[0])
        ),
        "int4pack": Way(
            lambda x, at: aten._weight_int4pack_mm_for_cpu(x, four[at][0], GROUP_SIZE, four[at][1]),
            len(four),
            size_of(four[0]),
        ),
    }


def copies_of(*tensors: torch.Tensor) -> list[tuple[torch.Tensor, ...]]:
    """Copy tensors until they fill ROTATED_BYTES."""
    count = max(2, -(-ROTATED_BYTES // size_of(tensors)))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def size_of(tensors: tuple[torch.Tensor, ...]) -> int:
    """Return the bytes of all of these."""
    return sum(tensor.nbytes for tensor in tensors)


def timed(run: Callable[[int], object], turns: int) -> float:
    """Return the seconds of one call, the mean over as many as rotate through memory."""
    started_s = time.perf_counter()
    for turn in range(turns):
        run(turn)
    return (time.perf_counter() - started_s) / turns


def kernel_table(
    shapes: list[tuple[int, int]], threads_tried: list[int], rows_tried: list[int], repeats: int
) -> None:
    """Print a line for each shape, number of threads and rows: times as fast, share, spread."""
    lib = library()
    if isinstance(lib, str):
        sys.exit(f"the kernel is not there: {lib}")
    print(f"\nvectors of {lib.zinfer_vector_bits()} bits; median times as fast as F.linear in ")
    print("bfloat16 (lowest to highest of the repeats; share of the read bandwidth)\n")
    torch.manual_seed(0)
    big = torch.ones(ROTATED_BYTES // 8, dtype=torch.int64)
    heading = True
    for out, inputs in shapes:
        ways = ways_for(out, inputs)
        others = [name for name in ways if name != "F.linear"]
        if heading:
            print(
                "| out x in | threads | rows | GB/s read | F.linear | " + " | ".join(others) + " |"
            )
            print("| --- | --- | --- | --- | --- |" + " --- |" * len(others))
            heading = False
        for threads in threads_tried:
            torch.set_num_threads(threads)
            for rows in rows_tried:
                cells = cells_of(ways, torch.randn(rows, inputs).bfloat16(), big, repeats)
                print(
                    f"| {out} x {inputs} | {threads} | {rows} | {' | '.join(cells)} |", flush=True
                )


def cells_of(ways: dict[str, Way], x: torch.Tensor, big: torch.Tensor, repeats: int) -> list[str]:
    """Time every way in turn; the bandwidth and one cell for each way."""
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    bandwidths = []
    for repeat in range(repeats + 1):
        bandwidth = big.nbytes / timed(lambda _: big.sum(), 1)
        taken = {
            name: timed(lambda at, way=way: way.run(x, at), way.copies)  # type: ignore[misc]
            for name, way in ways.items()
        }
        if repeat:  # the first turn warms up
            bandwidths.append(bandwidth)
            for name, each in taken.items():
                seconds[name].append(each)
    read = max(bandwidths)
    cells = [f"{read / 1e9:.1f}"]
    for name, way in ways.items():
        share = way.stored_bytes / statistics.median(seconds[name]) / read
        ratios = sorted(a / b for a, b in zip(seconds["F.linear"], seconds[name], strict=True))
        middle = f"{statistics.median(ratios):.2f}x ({ratios[0]:.1f} to {ratios[-1]:.1f}; "
        cells.append(f"{share:.2f}" if name == "F.linear" else f"{middle}{share:.2f})")
    return cells


def run_of(folder: Path, overrides: list[str]) -> dict[str, float] | None:
    """Run one job; its metrics, or None where it did not end well."""
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *overrides, "tracking=none", "format=json"],
        cwd=folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    result = json.loads(done.stdout)
    if result["status"] != "ok":
        print(f"{' '.join(overrides)}: {result['status']}: {result.get('reason')}", file=sys.stderr)
        return None
    metrics: dict[str, float] = result["metrics"]
    return metrics


def run_table(
    models: list[str], batches: list[int], offloads: list[str], rounds: int, threads: int
) -> None:
    """Print decode steps of each dtype beside their ratio to bfloat16's, and stored bytes."""
    print("\nmedian seconds of a decode step (times as fast as bfloat16; stored bytes)\n")
    print("| model | offload | rows | " + " | ".join(DTYPES) + " |")
    print("| --- | --- | --- |" + " --- |" * len(DTYPES))
    with tempfile.TemporaryDirectory(prefix="bench-quantised-", dir=Path.cwd()) as scratch:
        for model in models:
            for offload in offloads:
                for batch in batches:
                    found: dict[str, list[dict[str, float]]] = {name: [] for name in DTYPES}
                    for _ in range(rounds):
                        for dtype in DTYPES:
                            metrics = run_of(
                                Path(scratch), run_overrides(model, offload, batch, dtype, threads)
                            )
                            if metrics is not None:
                                found[dtype].append(metrics)
                    cells = " | ".join(run_cell(found, dtype) for dtype in DTYPES)
                    print(f"| {model} | {offload} | {batch} | {cells} |", flush=True)


def run_overrides(model: str, offload: str, batch: int, dtype: str, threads: int) -> list[str]:
    """Return the overrides of one run of the table."""
    disk = ["offload.nvme_path=swap"] if offload == "nvme" else []
    return [
        *MODELS[model], f"offload={offload}", *disk, *DTYPES[dtype],
        f"batch.batch_size={batch}", "batch.prompt_tokens=32", "batch.new_tokens=16",
        "batch.warmup=1", "batch.repeats=1", f"launcher.omp_threads={threads}",
    ]  # fmt: skip


def run_cell(found: dict[str, list[dict[str, float]]], dtype: str) -> str:
    """Return one dtype's step, its gain over bfloat16, and the bytes that its weights take."""
    if not found[dtype]:
        return "-"
    step = {
        name: statistics.median(run["decode_step_s"] for run in runs)
        for name, runs in found.items()
        if runs
    }
    stored = found[dtype][0].get("weight_stored_bytes")
    size = f"; {stored / 1e9:.2f} GB" if stored else ""
    gain = f"{step['bfloat16'] / step[dtype]:.2f}x" if "bfloat16" in step else "?"
    return f"{step[dtype]:.3f} s ({gain}{size})"


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", choices=("kernels", "runs"), help="one of the two tables")
    parser.add_argument("--repeats", type=int, default=5, help="of each product, in turn")
    parser.add_argument("--rounds", type=int, default=1, help="of each run, in turn")
    parser.add_argument("--threads", type=int, nargs="*", default=[1, os.cpu_count() or 1])
    parser.add_argument("--shapes", type=int, nargs="*", help="numbers of the shapes to measure")
    parser.add_argument("--rows", type=int, nargs="*", default=list(ROWS))
    parser.add_argument("--models", nargs="*", default=list(MODELS), choices=list(MODELS))
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8])
    parser.add_argument("--offloads", nargs="*", default=["none", "nvme"])
    arguments = parser.parse_args()
    print(heading(f"{os.cpu_count()} cores", f"PyTorch {torch.__version__}"))
    torch.set_grad_enabled(False)
    if arguments.only != "runs":
        shapes = [SHAPES[at] for at in arguments.shapes] if arguments.shapes else list(SHAPES)
        kernel_table(shapes, arguments.threads, arguments.rows, arguments.repeats)
    if arguments.only != "kernels":
        run_table(
            arguments.models, arguments.batches, arguments.offloads, arguments.rounds,
            max(arguments.threads),
        )  # fmt: skip


if __name__ == "__main__":
    main()
