"""Predict and run a fixed grid of small models, and score the predictions.

`make bench-prediction` runs it.

Six architectures x weights in none, cpu, nvme x float32, bfloat16 x three batches. Three of them
also in int8 and int4, scored apart. The calibration never saw two of the families, nor any of the
sizes. Prints Markdown and writes every row to prediction.csv.
"""

from __future__ import annotations

import argparse
import csv
import io
import json
import math
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir

from zinfer.config import RunConfig, parse_config
from zinfer.driver.run import run_job
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.machine.environment import environment
from zinfer.machine.hardware import calibration_of
from zinfer.paths import conf_dir

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "hidden_size": 512, "intermediate_size": 1408,
              "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4,
              "vocab_size": 16000, "max_position_embeddings": 2048, "tie_word_embeddings": False},
    "opt": {"model_type": "opt", "hidden_size": 640, "word_embed_proj_dim": 640,
            "ffn_dim": 2560, "num_hidden_layers": 6,
            "num_attention_heads": 10, "vocab_size": 16000, "max_position_embeddings": 2048},
    "bloom": {"model_type": "bloom", "hidden_size": 512, "n_layer": 6, "n_head": 8,
              "vocab_size": 32000},
    "mixtral": {"model_type": "mixtral", "hidden_size": 384, "intermediate_size": 768,
                "num_hidden_layers": 4, "num_attention_heads": 6, "num_key_value_heads": 2,
                "num_local_experts": 4, "num_experts_per_tok": 2, "vocab_size": 8000,
                "max_position_embeddings": 2048, "sliding_window": None,
                "tie_word_embeddings": False},
    "qwen3": {"model_type": "qwen3", "hidden_size": 512, "intermediate_size": 1536,
              "num_hidden_layers": 6, "num_attention_heads": 8, "num_key_value_heads": 4,
              "head_dim": 64, "vocab_size": 24000, "max_position_embeddings": 2048,
              "tie_word_embeddings": True},
    "gpt_neox": {"model_type": "gpt_neox", "hidden_size": 512, "intermediate_size": 2048,
                 "num_hidden_layers": 6, "num_attention_heads": 8,
                 "vocab_size": 16000, "max_position_embeddings": 2048},
}  # fmt: skip
UNSEEN_FAMILIES = ("qwen3", "gpt_neox")
OFFLOADS = ("none", "cpu", "nvme")
DTYPES = ("float32", "bfloat16")
BATCHES = (1, 4, 16)
QUANTISED = {
    "architecture": ("llama", "opt", "qwen3"),
    "offload": ("none", "nvme"),
    "dtype": ("int8", "int4"),
    "batch_size": (1, 16),
}
LENGTHS = ("batch.prompt_tokens=48", "batch.new_tokens=12", "batch.warmup=1", "batch.repeats=3")
SCORES = {  # metric: (what, goal of the median, goal of the 95th percentile)
    "weights": ("weight bytes, predicted / measured", 0.01, 0.01),
    "prediction_ratio_kv_cache": ("KV cache bytes", 0.01, 0.01),
    "prediction_ratio_peak_host_rss": ("peak host RSS", 0.05, 0.10),
    "prediction_ratio_tokens_per_s": ("generated tokens/s", 0.10, 0.25),
    "prediction_ratio_tokens_per_s_at_speed": (
        "the same, at the speed that the machine had then",
        None,
        None,
    ),
    "prediction_ratio_prefill": ("prefill time", None, None),
    "prediction_ratio_decode_step": ("decode step time", None, None),
    "prediction_ratio_load": ("load time", None, None),
}
BOX_SHARES = (0.8, 1.25)
"""A box this much smaller than what a run took must be refused, one this much larger accepted."""
HEADROOM = 0.05

Row = dict[str, Any]


def grid(folder: Path, threads: int | None, swap: str) -> list[tuple[Row, RunConfig]]:
    """Return every point with its names."""
    points = []
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for name, architecture in ARCHITECTURES.items():
            source = folder / name
            source.mkdir(parents=True)
            (source / "config.json").write_text(json.dumps(architecture))
            for offload in OFFLOADS:
                for dtype in (*DTYPES, *QUANTISED["dtype"]):
                    for batch in BATCHES:
                        row = {
                            "architecture": name,
                            "offload": offload,
                            "dtype": dtype,
                            "batch_size": batch,
                        }
                        if dtype not in DTYPES and any(
                            row[key] not in chosen for key, chosen in QUANTISED.items()
                        ):
                            continue
                        overrides = [
                            "model=custom", f"model.source={source}",
                            f"offload={offload}", f"dtype={dtype}",
                            f"batch.batch_size={batch}",
                            *LENGTHS, "tracking=none", f"launcher.omp_threads={threads or 'null'}",
                            *([f"offload.nvme_path={swap}"] if offload == "nvme" else []),
                        ]  # fmt: skip
                        config = parse_config(compose("config", overrides=overrides))
                        points.append((row, config))
    return points


def measured(names: Row, config: RunConfig, job_dir: Path) -> Row:
    """Run and score one point."""
    quiet = Terminal("text", out=io.StringIO(), err=io.StringIO())
    outcome = run_job(config, job_dir, quiet, forked=True)
    row = {**names, "status": outcome.status, "reason": outcome.reason, **outcome.metrics}
    if (
        outcome.status == "ok" and outcome.model and config.dtype.bits is None
    ):  # quantised ones are stored smaller
        row["weights"] = outcome.model["weight_bytes"] / outcome.metrics["weight_stored_bytes"]
    return row


def merged(passes: Sequence[Row]) -> Row:
    """Make one point of all its runs: the median of every number.

    `apart` is the fastest over the slowest in tokens/s. A failed run stays.
    """
    failed = next((row for row in passes if row["status"] != "ok"), None)
    if failed:
        return failed
    middle = {
        name: statistics.median(row[name] for row in passes)
        for name, value in passes[0].items()
        if isinstance(value, int | float)
        and all(isinstance(row.get(name), int | float) for row in passes)
    }
    rates = [row["generated_tokens_per_s"] for row in passes]
    return {
        **passes[0],
        **middle,
        **({"apart": max(rates) / min(rates)} if len(passes) > 1 else {}),
    }


def error(row: Row, metric: str) -> float | None:
    """Return the distance of predicted / measured from 1."""
    return abs(row[metric] - 1) if row.get(metric) else None


def quantiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Return the median, the 95th percentile (nearest rank) and the largest."""
    ordered = sorted(values)
    return statistics.median(ordered), ordered[math.ceil(0.95 * len(ordered)) - 1], ordered[-1]


def table(rows: list[Row]) -> list[str]:
    """Write the errors over the whole grid, with the goals."""
    lines = [
        "| quantity | points | median error | 95th percentile | largest | goal | reached |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for metric, (what, median_goal, tail_goal) in SCORES.items():
        errors = [value for row in rows if (value := error(row, metric)) is not None]
        if not errors:  # as the bytes of quantised weights
            continue
        median, tail, largest = quantiles(errors)
        goal = "" if median_goal is None else f"{median_goal:.0%}, {tail_goal:.0%}"
        reached = (
            ""
            if median_goal is None
            else "yes"
            if median <= median_goal and tail <= (tail_goal or 0)
            else "no"
        )
        lines.append(
            f"| {what} | {len(errors)} | {median:.1%} | {tail:.1%} | {largest:.1%} "
            f"| {goal} | {reached} |"
        )
    return lines


def apart(rows: list[Row]) -> list[str]:
    """Say by how much the runs of one point differ: no prediction can be nearer than that."""
    lines = []
    for offload in OFFLOADS:
        ratios = [
            row["apart"] - 1 for row in rows if row["offload"] == offload and row.get("apart")
        ]
        if ratios:
            median, tail, _ = quantiles(ratios)
            lines.append(
                f"- runs of the same point, fastest over slowest, weights in {offload}: "
                f"{median:.1%} apart, 95th {tail:.1%}"
            )
    return lines


def speed(rows: list[Row]) -> str:
    """Say how fast the machine itself was while the runs were timed."""
    slowdowns = [row["slowdown"] for row in rows if row.get("slowdown")]
    if len(slowdowns) < 2:
        return ""
    low, *_, high = statistics.quantiles(slowdowns, n=20, method="inclusive")
    return (
        f"- the processor took {statistics.median(slowdowns):.2f} times as long "
        "for the same work as when it was calibrated "
        f"(5th to 95th percentile of the runs: {low:.2f} to {high:.2f})"
    )


def by_kind(rows: list[Row]) -> list[str]:
    """Say where errors are: tokens/s and peak host RSS by architecture and by offload."""
    lines = [
        "| | points | tokens/s: median, 95th | bias "
        "| at the speed then | bias | peak host RSS | bias |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    kinds = (
        [("architecture", name) for name in ARCHITECTURES]
        + [("offload", name) for name in OFFLOADS]
        + [("dtype", name) for name in DTYPES]
    )
    for kind, name in kinds:
        chosen = [row for row in rows if row[kind] == name and row["status"] == "ok"]
        cells = []
        for metric in (
            "prediction_ratio_tokens_per_s",
            "prediction_ratio_tokens_per_s_at_speed",
            "prediction_ratio_peak_host_rss",
        ):
            ratios = [row[metric] for row in chosen if row.get(metric)]
            if ratios:
                median, tail, _ = quantiles([abs(ratio - 1) for ratio in ratios])
                cells += [f"{median:.1%}, {tail:.1%}", f"{statistics.median(ratios) - 1:+.1%}"]
            else:
                cells += ["-", "-"]
        unseen = " (family not calibrated)" if name in UNSEEN_FAMILIES else ""
        lines.append(f"| {name}{unseen} | {len(chosen)} | {' | '.join(cells)} |")
    return lines


def verdicts(rows: list[Row]) -> list[str]:
    """Count runs that were said to fit and failed, false "fits" and false refusals.

    The last two are asked of boxes around the memory that each run really took.
    """
    failed = [row for row in rows if row["status"] != "ok"]
    ratios = [
        row["prediction_ratio_peak_host_rss"]
        for row in rows
        if row.get("prediction_ratio_peak_host_rss")
    ]
    small, large = BOX_SHARES
    false_fits = sum(ratio <= (1 - HEADROOM) * small for ratio in ratios)
    false_refusals = sum(ratio > (1 - HEADROOM) * large for ratio in ratios)
    lines = [
        f"- said to fit and failed: {len(failed)} of {len(rows)}",
        f'- false "fits" on a box with {small:.0%} of the memory that the run took: '
        f"{false_fits} of {len(ratios)}",
        f"- false refusals on a box with {large:.0%} of it: {false_refusals} of {len(ratios)}",
    ]
    return lines + [
        f"- {row['architecture']} {row['offload']} {row['dtype']} {row['batch_size']}: "
        f"{row['status']}: {row['reason']}"
        for row in failed
    ]


def main() -> int:
    """Run the grid, print the tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--threads",
        type=int,
        default=1,
        help="launcher.omp_threads; the machine must be calibrated with as many",
    )
    parser.add_argument(
        "--swap",
        default=None,
        help="a folder on a local disk for offload=nvme; default: a temporary one here",
    )
    parser.add_argument("--out", type=Path, default=Path("prediction.csv"))
    parser.add_argument("--every", type=int, default=1, help="take only every n-th point")
    parser.add_argument(
        "--passes",
        type=int,
        default=1,
        help="runs of every point, the whole grid in turn; their median is scored",
    )
    arguments = parser.parse_args()
    started_s = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="bench-prediction-", dir=Path.cwd()) as scratch:
        points = grid(
            Path(scratch) / "models", arguments.threads, arguments.swap or f"{scratch}/swap"
        )[:: arguments.every]
        profile = calibration_of(points[0][1].hardware, 1, arguments.threads)
        if profile is None:
            print(
                f"Not calibrated with {arguments.threads} threads. "
                f"Run zinfer task=calibrate launcher.omp_threads={arguments.threads}",
                file=sys.stderr,
            )
            return 2
        runs: list[list[Row]] = [[] for _ in points]
        for number in range(arguments.passes * len(points)):
            which = number % len(points)
            runs[which].append(measured(*points[which], Path(scratch) / f"job{number}"))
            print(
                f"\r{number + 1} of {arguments.passes * len(points)}",
                end="",
                file=sys.stderr,
                flush=True,
            )
        rows = [merged(passes) for passes in runs]
        print(file=sys.stderr)
        Servers.close()
        facts = environment(points[0][1], None)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)
    checkout = facts["zinfer"]
    commit = f"{(checkout['commit'] or 'unknown')[:12]}{' (changed)' if checkout['dirty'] else ''}"
    seconds = time.perf_counter() - started_s
    print(
        f"{arguments.passes} x {len(rows)} runs in {seconds:.0f} s on {facts['cpu']['model']}, "
        f"{facts['cpu']['usable_cores']} cores, {arguments.threads} thread a run; "
        f"commit {commit}; calibrated {profile.created} in {profile.seconds:.0f} s\n"
    )
    plain, quantised = (
        [row for row in rows if row["dtype"] in DTYPES],
        [row for row in rows if row["dtype"] not in DTYPES],
    )
    print(
        "\n".join(
            [*table(plain), "", speed(plain), *apart(plain), *verdicts(rows), "", *by_kind(plain)]
        )
    )
    if quantised:
        print(
            "\n".join(
                [
                    "",
                    "Quantised weights (int8 and int4), not part of the goals:",
                    "",
                    *table(quantised),
                ]
            )
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
