"""What each job of a sweep is going to need, before any of them starts: who fits, who will be refused.

Models that were counted before are planned in the driver, without torch; the others in one process of their own
(`python -m zinfer.sweep.plan`, configurations on stdin), which keeps the counts for the next time.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field

from zinfer.config import ConfigError, RunConfig, config_from_tree, config_to_tree
from zinfer.driver.refusals import require_possible
from zinfer.driver.terminal import Terminal
from zinfer.job.outcome import Json
from zinfer.machine.hardware import detect_hardware
from zinfer.model.spec import is_counted
from zinfer.plan.fit import shortfall
from zinfer.plan.planned import plan_run

PLAN_TIMEOUT_S = 300.0


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """One job's needs, or why it will not run."""

    verdict: str
    """fits, does_not_fit, refused, or unknown."""
    reason: str | None = None
    needed_bytes: dict[str, int] = field(default_factory=dict)
    """Per tier; of one rank on a GPU, of all ranks elsewhere."""

    def document(self) -> Json:
        """JSON-able."""
        return asdict(self)


def plan_jobs(configs: Sequence[RunConfig], terminal: Terminal) -> list[JobPlan]:
    """One plan for each configuration, in their order."""
    uncounted = [index for index, config in enumerate(configs) if not is_counted(config.model)]
    plans: dict[int, JobPlan] = {}
    if uncounted:
        terminal.note(
            f"counting {len({configs[index].model.name for index in uncounted})} models for the first time: some seconds"
        )
        plans = dict(
            zip(uncounted, _planned_apart([configs[index] for index in uncounted]), strict=True)
        )
    return [
        plans[index] if index in plans else plan_job(config) for index, config in enumerate(configs)
    ]


def plan_job(config: RunConfig) -> JobPlan:
    """Imports torch where the model was not counted before."""
    from zinfer.plan.resolved import resolved_spec

    try:
        hardware = detect_hardware(config.hardware, config.offload.nvme_folder)
        require_possible(config, hardware, Terminal("text", err=io.StringIO()))
        spec = resolved_spec(config, hardware, _unsaid)
        planned = plan_run(config, hardware, spec)
        needed: dict[str, int] = {
            tier.name: tier.needed_bytes for tier in planned.plan.tiers if tier.needed_bytes
        }
        if not planned.fits:
            return JobPlan(
                verdict="does_not_fit",
                reason=shortfall(planned),
                needed_bytes=needed,
            )
    except (ConfigError, ValueError) as error:
        return JobPlan(verdict="refused", reason="; ".join(str(error).splitlines()))
    return JobPlan(verdict="fits", needed_bytes=needed)


def _unsaid(message: str) -> None:
    """Warnings of a plan are said by the job itself."""


def _planned_apart(configs: list[RunConfig]) -> list[JobPlan]:
    trees = json.dumps([config_to_tree(config) for config in configs])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zinfer.sweep.plan"],
            input=trees, capture_output=True, text=True, timeout=PLAN_TIMEOUT_S, check=True, start_new_session=True,
        )  # fmt: skip
        return [JobPlan(**plan) for plan in json.loads(done.stdout.splitlines()[-1])]
    except (OSError, ValueError, IndexError, subprocess.SubprocessError):
        return [JobPlan(verdict="unknown")] * len(configs)


if __name__ == "__main__":
    plans = [plan_job(config_from_tree(tree)) for tree in json.load(sys.stdin)]
    print(json.dumps([plan.document() for plan in plans]))
