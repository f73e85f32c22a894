"""Plan each job of a sweep before any of them starts: who fits, who will be refused.

Models that were counted before are planned in the driver, without torch. The others are planned in
a process of its own (`python -m zinfer.sweep.plan`, configurations on stdin, one plan a line on
stdout), which keeps the counts for the next time. A job that ends that process costs itself only.
"""

from __future__ import annotations

import io
import json
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from zinfer.config import ConfigError, RunConfig, config_from_tree, config_to_tree
from zinfer.config.tasks import task_of
from zinfer.driver.refusals import require_possible
from zinfer.driver.terminal import Terminal
from zinfer.job.outcome import Json
from zinfer.machine.hardware import detect_hardware
from zinfer.model.spec import is_counted
from zinfer.plan.fit import shortfall
from zinfer.plan.planned import Planned, plan_run
from zinfer.sweep.record import Verdict

PLAN_TIMEOUT_S = 300.0
"""For all models that are counted for the first time."""


@dataclass(frozen=True, kw_only=True)
class JobPlan:
    """The needs of one job, or why it will not run."""

    verdict: Verdict
    reason: str | None = None
    needed_bytes: dict[str, int] = field(default_factory=dict)
    """Per tier; of one rank on a GPU, of all ranks elsewhere."""
    generations: int = 0
    """Warm-up included; 0 for a job that only plans."""
    predicted_s: float | None = None
    """Seconds of all its generations; None on a machine that is not calibrated."""
    work_bytes: float | None = None
    """Bytes of its weights times the passes of all its generations."""

    def document(self) -> Json:
        """Return it as a JSON-able mapping."""
        return asdict(self)


def plan_jobs(configs: Sequence[RunConfig], terminal: Terminal) -> list[JobPlan]:
    """Return one plan for each configuration, in their order."""
    uncounted = [index for index, config in enumerate(configs) if not is_counted(config.model)]
    plans: dict[int, JobPlan] = {}
    if uncounted:
        models = len({str(configs[index].model) for index in uncounted})
        terminal.note(
            f"counting {models} model{'s' * (models > 1)} for the first time: some seconds each"
        )
        apart = planned_apart([configs[index] for index in uncounted])
        plans = dict(zip(uncounted, apart, strict=True))
    return [
        plans[index] if index in plans else plan_job(config) for index, config in enumerate(configs)
    ]


def plan_job(config: RunConfig) -> JobPlan:
    """Plan one job. Imports torch where its model was not counted before.

    An error that is nobody's refusal makes the verdict unknown: the job says it again when it runs.
    """
    try:
        return _plan_job(config)
    except ConfigError as error:
        return JobPlan(verdict="refused", reason="; ".join(error.problems))
    except ValueError as error:
        return JobPlan(verdict="refused", reason="; ".join(str(error).splitlines()))
    except Exception as error:  # transformers and the checkpoint's own code raise anything
        return JobPlan(verdict="unknown", reason=f"{type(error).__name__}: {error}")


def _plan_job(config: RunConfig) -> JobPlan:
    from zinfer.plan.resolved import resolved_spec

    hardware = detect_hardware(config.hardware, config.offload.nvme_folder)
    require_possible(config, hardware, Terminal("text", err=io.StringIO()))
    spec = resolved_spec(config, hardware, _unsaid)
    planned = plan_run(config, hardware, spec)
    needed: dict[str, int] = {
        tier.name: tier.needed_bytes for tier in planned.plan.tiers if tier.needed_bytes
    }
    size = generation_size(planned)
    if planned.fits:
        return JobPlan(verdict="fits", needed_bytes=needed, **size)
    return JobPlan(verdict="does_not_fit", reason=shortfall(planned), needed_bytes=needed, **size)


def generation_size(planned: Planned) -> dict[str, Any]:
    """Return JobPlan's fields that say how much the job has to generate; {} for task=plan."""
    config, prediction = planned.config, planned.prediction
    if not task_of(config).loads_model:
        return {}
    batch = config.batch
    generations, steps = batch.warmup + batch.repeats, batch.new_tokens - 1
    predicted_s = None
    if prediction.prefill_s is not None and prediction.decode_step_s is not None:
        predicted_s = generations * (prediction.prefill_s + steps * prediction.decode_step_s)
    return {
        "generations": generations,
        "predicted_s": predicted_s,
        "work_bytes": float(planned.plan.weight_stored_bytes) * generations * batch.new_tokens,
    }


def _unsaid(message: str) -> None:
    """Drop a plan's warning: the job itself says it."""


def planned_apart(configs: Sequence[RunConfig], timeout_s: float = PLAN_TIMEOUT_S) -> list[JobPlan]:
    """Plan in another process; where one job ends it, go on with the next in a new process."""
    deadline_s = time.monotonic() + timeout_s
    plans: list[JobPlan] = []
    while len(plans) < len(configs):
        left_s = deadline_s - time.monotonic()
        if left_s <= 0:
            late = JobPlan(verdict="unknown", reason=f"counting took more than {timeout_s:g} s")
            return plans + [late] * (len(configs) - len(plans))
        found, end = _one_process(configs[len(plans) :], left_s)
        plans += found
        if len(plans) < len(configs):
            plans.append(JobPlan(verdict="unknown", reason=end))
    return plans


def _one_process(configs: Sequence[RunConfig], timeout_s: float) -> tuple[list[JobPlan], str]:
    """Return the plans that one process made, and how it ended."""
    trees = json.dumps([config_to_tree(config) for config in configs])
    try:
        done = subprocess.run(
            [sys.executable, "-m", "zinfer.sweep.plan"],
            input=trees, capture_output=True, text=True, timeout=timeout_s, check=False,
            start_new_session=True,
        )  # fmt: skip
    except subprocess.TimeoutExpired as late:
        output: bytes = late.stdout or b""  # bytes, also with text=True
        return _plans_in(
            output.decode(errors="replace")
        ), f"counting this model took more than {timeout_s:.0f} s"
    said = [line for line in done.stderr.splitlines() if line.strip()]
    how = f"ended with exit code {done.returncode}"
    return _plans_in(done.stdout), f"counting this model {how}: {said[-1] if said else 'no word'}"


def _plans_in(output: str) -> list[JobPlan]:
    """Read the complete lines that are plans; libraries print to stdout too."""
    lines = [line for line in output.splitlines(keepends=True) if line.startswith(MARK)]
    return [JobPlan(**json.loads(line.removeprefix(MARK))) for line in lines if line.endswith("\n")]


MARK = "zinfer plan: "


def main() -> None:
    """Plan the configurations on stdin, one line for each plan as soon as it is made."""
    for tree in json.load(sys.stdin):
        try:
            plan = plan_job(config_from_tree(tree))
        except ConfigError as error:
            plan = JobPlan(verdict="refused", reason="; ".join(error.problems))
        print(MARK + json.dumps(plan.document()), flush=True)


if __name__ == "__main__":
    main()
