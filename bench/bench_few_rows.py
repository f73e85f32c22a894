"""Measure decode steps with 16-bit weights, by PyTorch and by what dtype.kernel=auto chooses.

One process loads the model once and generates by both ways in turn, so that a machine whose speed
drifts gives the same ratio. A LLaMA of 400M random weights on the device, in bfloat16.
"""

from __future__ import annotations

import argparse
import os
import statistics
import tempfile
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

from bench_quantised import LLAMA_400M
from heading import heading
from hydra import compose, initialize_config_dir

from zinfer.config import RunConfig, parse_config
from zinfer.job.events import EventLog
from zinfer.machine import native_ops
from zinfer.paths import conf_dir

if TYPE_CHECKING:
    from zinfer.model.spec import ModelSpec
    from zinfer.worker.engines import Engine

SHARED = (
    *LLAMA_400M, "dtype=bfloat16", "offload=none", "batch.prompt_tokens=32", "batch.new_tokens=16",
    "batch.warmup=0", "batch.repeats=1", "tracking=none",
)  # fmt: skip
PORT = 29611


def config_of(rows: int, *overrides: str) -> RunConfig:
    """Compose a run of so many rows."""
    settings = [*SHARED, f"batch.batch_size={rows}", *overrides]
    with initialize_config_dir(conf_dir(), version_base="1.3"):
        return parse_config(compose("config", overrides=settings))


def alone() -> None:
    """Be the only rank, as a worker is that the driver starts."""
    os.environ.update(native_ops.worker_environment())
    os.environ.update(RANK="0", WORLD_SIZE="1", LOCAL_RANK="0", DS_ACCELERATOR="cpu")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(PORT))


def main() -> None:
    """Print a line for each number of rows."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 4, 8])
    parser.add_argument("--pairs", type=int, default=4)
    arguments = parser.parse_args()
    alone()
    import torch

    torch.set_num_threads(arguments.threads)
    from zinfer.worker.run import load_engine, prepare

    print(heading(f"{arguments.threads} threads", f"PyTorch {torch.__version__}") + "\n")
    print("| rows | PyTorch, ms | auto, ms | times as fast (lowest to highest) | ours |")
    print("| --- | --- | --- | --- | --- |")
    with tempfile.TemporaryDirectory(prefix="bench-few-rows-") as folder:
        events = EventLog(Path(folder))
        planned = prepare(config_of(max(arguments.batches)), Path(folder), events)
        engine = load_engine(planned, events).engine
        for rows in arguments.batches:
            print(line(engine, planned.spec, rows, arguments.pairs, events), flush=True)


def line(engine: Engine, spec: ModelSpec, rows: int, pairs: int, events: EventLog) -> str:
    """Generate by both ways in turn; compare the calm steps of each pair."""
    from zinfer.worker.generate import generate_timed
    from zinfer.worker.kv_cache.session import KvSession
    from zinfer.worker.skinny.choice import linear_choice
    from zinfer.worker.skinny.modules import own_products_up_to, use_own_products
    from zinfer.worker.workload import prompt_ids

    config = config_of(rows)
    choice = linear_choice(config, spec, on_cpu=True, share=lambda value: [value])
    plain = config_of(rows, "dtype.kernel=torch")
    use_own_products(engine.model, choice.own, rows)
    for module in engine.model.modules():  # what was chosen for other rows is undone
        if hasattr(module, "own_rows"):
            module.own_rows = rows if tuple(module.weight.ds_shape) in choice.own else 0
    prompts = prompt_ids(plain.batch, spec.vocab_size, None)
    steps_s: dict[str, list[float]] = {"torch": [], "auto": []}
    for pair in range(pairs + 1):
        for way, found in steps_s.items():
            with own_products_up_to(0, engine.model) if way == "torch" else nullcontext():
                made = generate_timed(engine, prompts, plain.batch, events, KvSession())
            if pair:  # the first one warms up
                found.append(statistics.quantiles(made.samples[-1].decode_step_s, n=4)[0])
    torch_s, auto_s = steps_s.values()
    ratios = sorted(one / other for one, other in zip(torch_s, auto_s, strict=True))
    ours = sum(trial.takes_ours for trial in choice.trials)
    return (
        f"| {rows} | {1e3 * statistics.median(torch_s):.1f} "
        f"| {1e3 * statistics.median(auto_s):.1f} "
        f"| {statistics.median(ratios):.2f}x ({ratios[0]:.2f} to {ratios[-1]:.2f}) "
        f"| {ours} of {len(choice.trials)} shapes |"
    )


if __name__ == "__main__":
    main()
