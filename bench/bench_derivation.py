"""Compare tokens/s of zero=tuned with the published derivation, in turn. `make bench-derivation`.

The published NVMe buffers page-lock 20 GiB. So on NVMe tuned is compared with itself less one
thing:
fetching module by module, and without huge pages.
"""

from __future__ import annotations

import argparse
import io
import statistics
import sys
import tempfile
from pathlib import Path

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
MODELS = ("smollm2-135m",)
MODES = (
    ("offload=none", "zero=paper"),
    ("offload=cpu", "zero=paper"),
    ("offload=nvme", "zero.leaf_layers=false"),
    ("offload=nvme", "offload.huge_pages=false"),
)
BATCHES = (1, 8)


def config_of(*overrides: str) -> RunConfig:
    """Compose the run that these overrides of the defaults make."""
    return parse_config(compose("config", overrides=[*SHARED, *overrides]))


def tokens_per_s(config: RunConfig, job_dir: Path) -> float:
    """Return the generated tokens/s of one job.

    Raises:
        RuntimeError: it did not end well.
    """
    outcome = run_job(
        config, job_dir, Terminal("text", out=io.StringIO(), err=io.StringIO()), forked=True
    )
    if outcome.status != "ok":
        raise RuntimeError(f"{outcome.status}: {outcome.reason}")
    return outcome.metrics["generated_tokens_per_s"]


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pairs", type=int, default=3)
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
        shared = ("dtype=bfloat16", f"launcher.omp_threads={arguments.threads}")
        facts = environment(config_of(*shared), None)
        for model in MODELS:
            for offload, other in (mode for mode in MODES if arguments.only in mode[1]):
                for batch in BATCHES:
                    point = (f"model={model}", offload, f"batch.batch_size={batch}", *shared)
                    point = (
                        (*point, f"offload.nvme_path={scratch}/swap")
                        if offload == "offload=nvme"
                        else point
                    )
                    ratios, after = [], []
                    for pair in range(arguments.pairs):
                        folder = Path(scratch) / f"{model}-{offload}-{other}-{batch}-{pair}"
                        before = tokens_per_s(config_of(*point, other), folder / "before")
                        after.append(tokens_per_s(config_of(*point), folder / "after"))
                        ratios.append(after[-1] / before)
                    lines.append(
                        f"| {model} | {offload} | {batch} | {other} "
                        f"| {statistics.median(after):.1f} "
                        f"| {statistics.median(ratios):.2f} "
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
        "| model | weights | batch | compared with | tuned, tokens/s | tuned / other |\n"
        "| --- | --- | --- | --- | --- | --- |"
    )
    print("\n".join(lines))
    return 0


if __name__ == "__main__":
    sys.exit(main())
