"""`make bench`: what zinfer costs. Prints a Markdown table.

Run it on a machine that does nothing else. Everything is measured in turn (A B A B ...) and given
as ratios of neighbours, so that it holds when the machine's speed drifts:

- CPU time of `zinfer --help` and of a refusal, over that of an empty Hydra application's --help;
- tokens/s and wall time, against a bare script that does the same DeepSpeed run;
- loading of random weights of a 400M-parameter model, and the driver's memory, as they are.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from heading import heading

from zinfer.machine import native_ops
from zinfer.model.weights.demo_model import make_demo_model

HERE = Path(__file__).parent
BATCH, PROMPT_TOKENS, NEW_TOKENS, WARMUP, REPEATS = 4, 64, 32, 1, 3
MODEL_400M = (
    "model=tiny-llama",
    *(f"model.overrides.{name}={value}" for name, value in {
        "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24,
        "num_attention_heads": 16, "num_key_value_heads": 16, "vocab_size": 4096,
    }.items()),
)  # fmt: skip


@dataclass(frozen=True)
class Row:
    """One line of the table."""

    what: str
    goal: str
    figure: str


def cpu_s(command: list[str], folder: Path) -> float:
    """Run a command. CPU seconds of it and its children."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(
        command, cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, check=False
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def zinfer(folder: Path, *overrides: str) -> tuple[dict[str, Any], float, int]:
    """Run one job. Its result, wall seconds, and the driver's peak resident bytes."""
    started_s = time.perf_counter()
    command = [sys.executable, "-m", "zinfer", "format=json", *overrides]
    with tempfile.TemporaryFile() as out, (folder / "stderr.log").open("ab") as err:
        driver = subprocess.Popen(command, cwd=folder, stdout=out, stderr=err)
        peak = 0
        while driver.poll() is None:
            peak = max(peak, peak_rss_bytes(driver.pid))
            time.sleep(0.05)
        wall_s = time.perf_counter() - started_s
        out.seek(0)
        result = json.loads(out.read())
    if result["status"] not in ("ok",):
        why = result.get("reason") or result.get("problems")
        sys.exit(f"the job did not end well: {result['status']}: {why}")
    return result, wall_s, peak


def peak_rss_bytes(pid: int) -> int:
    """Read VmHWM of a running process, 0 if it has ended. Source: proc(5)."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM:")), 0)


def spread(values: list[float], digits: str = ".2f") -> str:
    """Write values as `median (min to max)`."""
    return (
        f"{statistics.median(values):{digits}} ({min(values):{digits}} to {max(values):{digits}})"
    )


STARTS = (  # what, arguments, at most this many times an empty Hydra application's --help
    ("`zinfer --help`", ["--help"], 2.0),
    ("a refused configuration", ["batch.batch_size=0", "launcher.ranks=3"], 1.8),
)


def start_up(folder: Path, runs: int) -> list[Row]:
    """Measure the CPU time of what must answer at once, over that of an empty Hydra application."""
    empty = [sys.executable, str(HERE / "empty_app.py"), "--help"]
    commands = [[sys.executable, "-m", "zinfer", *arguments] for _, arguments, _ in STARTS]
    for command in (empty, *commands):
        cpu_s(command, folder)  # bytecode and the page cache
    turns = [[cpu_s(command, folder) for command in (empty, *commands)] for _ in range(runs)]
    rows = []
    for number, (what, _, goal) in enumerate(STARTS, start=1):
        ratios = [turn[number] / turn[0] for turn in turns]
        seconds = [turn[number] for turn in turns]
        rows.append(
            Row(f"{what}, CPU time / an empty Hydra app's", f"at most {goal}", spread(ratios))
        )
        rows.append(Row(f"{what}, CPU s", "", spread(seconds)))
    return rows


def against_bare_script(folder: Path, pairs: int, offload: str) -> list[Row]:
    """Run zinfer and the bare script in turn: same model, batch and DeepSpeed JSON."""
    model = make_demo_model()
    settings = (
        "model=smollm2-135m", "weights=pretrained", "dtype=bfloat16", f"offload={offload}",
        f"batch.batch_size={BATCH}", f"batch.prompt_tokens={PROMPT_TOKENS}",
        f"batch.new_tokens={NEW_TOKENS}", f"batch.warmup={WARMUP}", f"batch.repeats={REPEATS}",
        "dtype.kernel=torch",  # as the script multiplies
    )  # fmt: skip
    result, _, _ = zinfer(folder, *settings)  # the JSON, and everything warm: database, page cache
    ds = result["deepspeed"]
    if offload == "nvme":
        ds["zero_optimization"]["offload_param"]["nvme_path"] = str(folder / "bare_swap")
    ds_file = folder / "ds.json"
    ds_file.write_text(json.dumps(ds))
    numbers = [str(number) for number in (BATCH, PROMPT_TOKENS, NEW_TOKENS, WARMUP, REPEATS)]
    bare = [sys.executable, str(HERE / "bare_script.py"), str(model), str(ds_file), *numbers]
    env = {
        **os.environ,
        **native_ops.worker_environment(),
        "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0))),
    }
    ratios, extra_s, drivers = [], [], []
    for _ in range(pairs):
        result, wall_s, driver_bytes = zinfer(folder, *settings)
        started_s = time.perf_counter()
        done = subprocess.run(bare, cwd=folder, env=env, capture_output=True, text=True, check=True)
        bare_wall_s = time.perf_counter() - started_s
        totals = json.loads(done.stdout.strip().splitlines()[-1])["total_s"]
        ratios.append(
            result["metrics"]["generated_tokens_per_s"]
            * statistics.median(totals)
            / (BATCH * NEW_TOKENS)
        )
        extra_s.append(wall_s - bare_wall_s)
        drivers.append(driver_bytes / 2**20)
    return [
        Row(
            f"tokens/s, zinfer / bare script, offload={offload}",
            "at least 0.98",
            spread(ratios, ".3f"),
        ),
        Row(f"wall time, zinfer - bare script, s, offload={offload}", "at most 2", spread(extra_s)),
        Row(
            f"the driver's peak memory, MiB, offload={offload}", "under 300", spread(drivers, ".0f")
        ),
    ]


def dummy_weights(folder: Path, runs: int) -> list[Row]:
    """Measure the loading of random weights, without imports and compiled ops."""
    rows = []
    for offload, goal in (("cpu", "at most 1.5"), ("nvme", "at most 4")):
        loads = [
            zinfer(
                folder,
                *MODEL_400M,
                f"offload={offload}",
                "dtype=bfloat16",
                "batch.new_tokens=2",
                "batch.repeats=1",
                "batch.warmup=0",
            )[0]
            for _ in range(runs)
        ]
        parameters = loads[0]["model"]["parameters"] / 1e6
        rows.append(
            Row(
                f"load_s, {parameters:.0f}M dummy parameters, offload={offload}",
                goal,
                spread([load["metrics"]["load_s"] for load in loads]),
            )
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=int, default=3, help="zinfer and bare script in turn, this many times"
    )
    parser.add_argument(
        "--only",
        choices=["start"],
        help="start: only what must answer at once; loads no model and compiles nothing",
    )
    arguments = parser.parse_args()
    print("\n" + heading(f"{os.cpu_count()} cores"))
    print("median (min to max)\n")
    print("| what | goal | measured |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        show(start_up(folder, 10))
        if arguments.only == "start":
            return
        native_ops.build(native_ops.all_ops())
        show(dummy_weights(folder, 3))
        for offload in ("cpu", "nvme"):
            show(against_bare_script(folder, arguments.pairs, offload))


def show(rows: list[Row]) -> None:
    """Print lines of the table as soon as they are measured."""
    for row in rows:
        print(f"| {row.what} | {row.goal} | {row.figure} |", flush=True)


if __name__ == "__main__":
    main()
