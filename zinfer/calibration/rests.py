"""Take from each measured pass what its kernels explain. The rest is what a run costs besides.

A pass is one decode step, or one prefill. Its kernels are its matrix products, its attention and
its choice of the next token, at the rates that the same calibration measured.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

from zinfer.config import RunConfig
from zinfer.job.calibration import HIDDEN, Job
from zinfer.job.outcome import Json
from zinfer.machine.profile import CalibrationProfile
from zinfer.model.spec import ModelSpec, model_spec
from zinfer.plan.kv_seconds import attention_seconds
from zinfer.plan.prediction import elementwise_seconds
from zinfer.plan.product_seconds import products_seconds

Measured = tuple[Job, RunConfig, Json]
"""A job, its configuration, and its result document with samples."""


@dataclass(frozen=True, kw_only=True)
class Rest:
    """One run of a job, and the seconds of its passes that its kernels do not explain."""

    job: Job
    config: RunConfig
    spec: ModelSpec
    calm_s: float
    """Of a calm pass; see calm_and_usual_s."""
    usual_s: float
    """Of a usual pass, without the disturbance that is usual."""
    products_s: float
    """What the matrix products of the pass are taken to need."""

    @property
    def is_prefill(self) -> bool:
        """Return whether the pass is a prefill."""
        return is_prefill(self.job)

    @property
    def is_small(self) -> bool:
        """Return whether the model is so small that a layer is nothing but fixed cost."""
        return self.job.hidden == HIDDEN


def is_prefill(job: Job) -> bool:
    """Return whether this job is there for its prefill."""
    return job.batch.new_tokens <= 2


def rests_of(
    rates: CalibrationProfile, measured: Sequence[Measured], disturbance: float
) -> list[Rest]:
    """Return the rest of every run.

    Args:
        rates: a profile with the measured rates of kernels; its costs are not looked at.
        disturbance: what a usual run took over the calmest run of the same job.
    """
    return [_rest(rates, disturbance, *entry) for entry in measured]


def _rest(
    rates: CalibrationProfile, disturbance: float, job: Job, config: RunConfig, result: Json
) -> Rest:
    spec, batch = model_spec(config.model, compute_dtype=config.dtype.compute), config.batch
    if is_prefill(job):
        new, context = batch.prompt_tokens, float(batch.prompt_tokens)
    else:
        new, context = 1, batch.prompt_tokens + batch.new_tokens / 2
    products_s = products_seconds(spec, config, rates, batch.batch_size, new) or 0.0
    kernels_s = (
        products_s
        + attention_seconds(spec, rates, batch.batch_size, new, context)
        + elementwise_seconds(spec, 0.0, rates, batch.batch_size, new)
    )
    calm_s, usual_s = calm_and_usual_s(job, result)
    return Rest(
        job=job,
        config=config,
        spec=spec,
        calm_s=calm_s - kernels_s,
        usual_s=usual_s / disturbance - kernels_s,
        products_s=products_s,
    )


def calm_and_usual_s(job: Job, result: Json) -> tuple[float, float]:
    """Return seconds of a calm and of a usual pass of one run.

    For decode steps these are their lower quartile and their median. For prefills, of which there
    are few, the fastest and the median prefill.
    """
    timed = [sample for sample in result["samples"] if sample["kind"] == "timed"]
    if is_prefill(job):
        prefills = [sample["prefill_s"] for sample in timed]
        return min(prefills), statistics.median(prefills)
    steps = [seconds for sample in timed for seconds in sample["decode_step_s"]]
    return statistics.quantiles(steps, n=4)[0], statistics.median(steps)


def calm_times_s(measured: Sequence[Measured]) -> dict[Job, list[float]]:
    """Return, for each job, the seconds of a calm pass in each of its runs."""
    found: dict[Job, list[float]] = {}
    for job, _, result in measured:
        found.setdefault(job, []).append(calm_and_usual_s(job, result)[0])
    return found


def disturbance_of(measured: Sequence[Measured]) -> float:
    """Return how much others on this machine slow a usual run, at least 1.

    For each run divide its usual pass by the calmest pass of the same job; take the median.
    """
    calmest_s = {job: min(times_s) for job, times_s in calm_times_s(measured).items()}
    ratios = [calm_and_usual_s(job, result)[1] / calmest_s[job] for job, _, result in measured]
    return max(1.0, statistics.median(ratios))


def calmest(rests: Iterable[Rest]) -> list[Rest]:
    """Return, for each job, the run that took least: whatever else the machine does only adds."""
    least: dict[Job, Rest] = {}
    for rest in rests:
        if rest.job not in least or rest.calm_s < least[rest.job].calm_s:
            least[rest.job] = rest
    return list(least.values())


def same_job(job: Job, other: Job) -> bool:
    """Return whether two jobs differ only in how often they may run."""
    return replace(job, rounds=0) == replace(other, rounds=0)


def line(points: Iterable[tuple[float, float]]) -> tuple[float, float]:
    """Fit y = a + b * x by least squares, with neither below zero. Returns (a, b)."""
    xs, ys = zip(*points, strict=True)
    x, y = statistics.fmean(xs), statistics.fmean(ys)
    spread = sum((one - x) ** 2 for one in xs)
    b = 0.0
    if spread:
        b = sum((one - x) * (other - y) for one, other in zip(xs, ys, strict=True)) / spread
    if b < 0:
        return max(0.0, y), 0.0
    if y - b * x >= 0:
        return y - b * x, b
    through_zero = sum(one * other for one, other in zip(xs, ys, strict=True))
    return 0.0, max(0.0, through_zero / sum(one * one for one in xs))
