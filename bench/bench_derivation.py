"""Compare tokens/s of zero=tuned with the published derivation, in turn. `make bench-derivation`.

The published NVMe buffers page-lock 20 GiB. So on NVMe tuned is compared with itself less one
thing: fetching module by module, and without huge pages. Without offload it is also compared with
itself fetching layers, and with plain transformers.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from itertools import product
from pathlib import Path

from bench_quantised import LLAMA_400M
from hydra import compose, initialize_config_dir

from zinfer.config import RunConfig, parse_config
from zinfer.driver.run import run_job
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.machine.environment import environment
from zinfer.paths import conf_dir

SHARED = [
    "tracking=none",
    "batch.prompt_tokens=48",
    "batch.new_tokens=16",
    "batch.warmup=1",
    "batch.repeats=3",
]
MODELS = {"smollm2-135m": ["model=smollm2-135m"], "LLaMA, 400M": LLAMA_400M}
MODES = (
    ("offload=none", "zero=paper"),
    ("offload=none", "zero.leaf_layers=true zero.persistence_threshold_numel=1024"),
    ("offload=none", "engine=resident"),
    ("offload=cpu", "zero=paper"),
    ("offload=nvme", "zero.leaf_layers=false"),
    ("offload=nvme", "offload.huge_pages=false"),
)
BATCHES = (1, 8)


def config_of(*overrides: str) -> RunConfig:
    """Compose the run that these overrides of the defaults make."""
    return parse_config(compose("config", overrides=[*SHARED, *overrides]))


def speed(config: RunConfig, job_dir: Path) -> tuple[float, float]:
    """Return the generated tokens/s of one job, and the milliseconds of its decode step.

    Raises:
        RuntimeError: it did not end well.
    """
    outcome = run_job(
        config, job_dir, Terminal("text", out=io.StringIO(), err=io.StringIO()), forked=True
    )
    if outcome.status != "ok":
        raise RuntimeError(f"{outcome.status}: {outcome.reason}")
    return outcome.metrics["generated_tokens_per_s"], 1000 * outcome.metrics["decode_step_s"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--models", nargs="*", default=["smollm2-135m"], choices=list(MODELS))
    parser.add_argument("--dtypes", nargs="*", default=["bfloat16"])
    parser.add_argument("--batches", nargs="*", type=int, default=list(BATCHES))
    parser.add_argument(
        "--only",
        default="",
        help="compare with overrides only that contain this, such as huge_pages",
    )
    arguments = parser.parse_args()
    lines = []
    with (
        initialize_config_dir(conf_dir(), version_base="1.3"),
        tempfile.TemporaryDirectory(prefix="bench-", dir=Path.cwd()) as scratch,
    ):
        shared = ("dtype.compute=bfloat16", f"launcher.omp_threads={arguments.threads}")
        facts = environment(config_of("dtype=bfloat16", *shared), None)
        chosen = [mode for mode in MODES if arguments.only in mode[1]]
        for model, dtype, (offload, other) in product(arguments.models, arguments.dtypes, chosen):
            for batch in arguments.batches:
                # zero=paper multiplies by PyTorch alone; packed weights are DeepSpeed's there
                kernel = () if dtype.startswith("int") else ("dtype.kernel=torch",)
                weights = (*MODELS[model], f"dtype={dtype}", *kernel)
                point = (*weights, offload, f"batch.batch_size={batch}", *shared)
                point = (
                    (*point, f"offload.nvme_path={scratch}/swap")
                    if offload == "offload=nvme"
                    else point
                )
                before, after = [], []
                for pair in range(arguments.pairs):
                    folder = Path(scratch) / f"{len(lines)}-{pair}"
                    compared = config_of(*point, *other.split())
                    before.append(speed(compared, folder / "before"))
                    after.append(speed(config_of(*point), folder / "after"))
                ratios = [mine[0] / theirs[0] for mine, theirs in zip(after, before, strict=True)]
                rate, step_ms = (statistics.median(each) for each in zip(*after, strict=True))
                other_ms = statistics.median(step for _, step in before)
                lines.append(
                    f"| {model}, {dtype} | {offload} | {batch} | {other} | {rate:.1f} "
                    f"| {step_ms:.1f} | {other_ms:.1f} | {statistics.median(ratios):.2f} "
                    f"({min(ratios):.2f} to {max(ratios):.2f}) |"
                )
                print(lines[-1], file=sys.stderr, flush=True)
        Servers.close()
    checkout = facts["zinfer"]
    commit = (checkout["commit"] or "unknown")[:12] + (" (changed)" if checkout["dirty"] else "")
    print(
        f"{facts['cpu']['model']}, {facts['cpu']['usable_cores']} cores, "
        f"{arguments.threads} thread a run; commit {commit}; {arguments.pairs} pairs\n"
    )
    print(
        "| model | weights | batch | compared with | tuned, tokens/s | its step, ms | other's step "
        "| tuned / other, tokens/s |\n| --- | --- | --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
