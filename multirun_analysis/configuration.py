"""A configuration: runs that differ in nothing but when they ran, with median and spread."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property

from multirun_analysis.labels import LABELS, NO_STREAM, WEIGHTS_IN
from multirun_analysis.runs import Run
from multirun_analysis.spread import Spread, merge
from zinfer.plan.binding import binding_words

RATE = "generated_tokens_per_s"
"""The metric that configurations are ranked by."""
LATENCY = "decode_step_s"
CIRCUMSTANCES = {
    "weights": "kinds of weights",
    "hardware": "machines",
    "commit": "commits",
    "method_version": "method versions",
}
"""Field of Context -> what several of it are called."""
VERDICTS = ("disturbed", "noisy", "stable")
"""Of stability, the worst first."""


@dataclass(frozen=True, kw_only=True, order=True)
class Context:
    """The circumstances of a run.

    Numbers of different contexts are never averaged and never divided by each other.
    """

    weights: str
    """dummy or pretrained."""
    hardware: str
    """Fingerprint of the machine, its instruction sets included; of a plan for a published box,
    the box's name."""
    device: str
    commit: str
    dirty: str
    method_version: str

    @property
    def commit_label(self) -> str:
        """'a1b2c3d', '*' behind it for a changed working tree."""
        return self.commit[:7] + ("*" if self.dirty == "true" else "")


@dataclass(frozen=True)
class Configuration:
    """Runs that differ in nothing but when they ran."""

    choices: Mapping[str, str]
    """Every parameter that was set."""
    context: Context
    runs: tuple[Run, ...]
    """Oldest first; failed ones included."""

    @cached_property
    def ok_runs(self) -> tuple[Run, ...]:
        """Runs that ended well."""
        return tuple(run for run in self.runs if run.status == "ok")

    @cached_property
    def failed_runs(self) -> tuple[Run, ...]:
        """Runs that neither ended well nor were only planned."""
        return tuple(run for run in self.runs if run.status not in ("ok", "planned"))

    @cached_property
    def status(self) -> str:
        """`ok` once one run of it ended well, otherwise what the newest came to."""
        return "ok" if self.ok_runs else self.runs[-1].status

    @property
    def planned(self) -> bool:
        """True where task=plan was asked for, so that nothing was to be measured."""
        return self.choices.get("task") == "plan"

    @cached_property
    def reason(self) -> str | None:
        """Say why the newest failed run failed."""
        return next((run.reason for run in reversed(self.failed_runs) if run.reason), None)

    @cached_property
    def stability(self) -> str | None:
        """Return the worst verdict of the runs that ended well; None where none gave one."""
        verdicts = {run.stability for run in self.ok_runs}
        return next((verdict for verdict in VERDICTS if verdict in verdicts), None)

    @cached_property
    def rate_spread(self) -> Spread | None:
        """Generated tokens/s; None where no run measured them."""
        return self.spread(RATE)

    @property
    def measured(self) -> bool:
        """True where a run measured tokens/s."""
        return self.rate_spread is not None

    @property
    def rate(self) -> float:
        """Median of the generated tokens/s, 0 for sorting where none were measured."""
        return self.rate_spread.median if self.rate_spread else 0.0

    @property
    def newest(self) -> Run:
        """Return the newest run that ended well, or else the newest."""
        return (self.ok_runs or self.runs)[-1]

    @property
    def model(self) -> str:
        """Name of the model."""
        return self.choices.get("model.name", "unknown")

    @property
    def offload(self) -> str:
        """Return where weights are kept: none, cpu or nvme."""
        return self.choices.get("offload.device", "unknown")

    @property
    def streams(self) -> bool:
        """False where no weight is read from elsewhere during a step, also when `offload` says so.

        ZeRO keeps parameters on the device that are smaller than its persistence threshold: with a
        small model that is all of them, and nothing is swapped.
        """
        if self.offload == "none":
            return False
        nvme = self.value("plan_disk_needed_bytes") if self.offload == "nvme" else None
        return self.value("streamed_bytes_per_s") != 0 and nvme != 0

    @cached_property
    def dtype(self) -> str:
        """Storage type of the weights; for `auto` the type that it came to."""
        wanted = self.choices.get("dtype.weights", "unknown")
        return self.newest.tags.get("zinfer.dtype", wanted) if wanted == "auto" else wanted

    @property
    def weights_bits(self) -> int | None:
        """Bits of a stored weight; None when the type is not known."""
        return {"int4": 4, "int8": 8, "float16": 16, "bfloat16": 16, "float32": 32}.get(self.dtype)

    @property
    def workload(self) -> tuple[int | None, int | None]:
        """(prompt tokens, new tokens): speeds of different workloads are different quantities."""
        return self.number("batch.prompt_tokens"), self.number("batch.new_tokens")

    @property
    def batch_size(self) -> int | None:
        """Sequences at once; None where it was not logged."""
        return self.number("batch.batch_size")

    def chosen(self, choice: str) -> str:
        """Return the value of a choice; of dtype.weights, what `auto` came to."""
        return self.dtype if choice == "dtype.weights" else self.choices.get(choice, "-")

    def number(self, choice: str) -> int | None:
        """Return a choice that is a whole number; None for any other."""
        text = self.choices.get(choice, "")
        return int(text) if text.isdecimal() else None

    def value(self, metric: str) -> float | None:
        """Return the median over the runs that ended well, or over all runs where none did."""
        runs = self.ok_runs or self.runs
        values = [run.metrics[metric] for run in runs if metric in run.metrics]
        return statistics.median(values) if values else None

    def tag(self, name: str) -> str | None:
        """Return a tag of the newest run that has it."""
        runs = reversed(self.ok_runs or self.runs)
        return next((run.tags[name] for run in runs if name in run.tags), None)

    @property
    def binding_resource(self) -> str | None:
        """Resource that a decode step waits for, in words; None where no ceiling was logged."""
        resource = self.tag("zinfer.binding_resource")
        return None if resource is None else binding_words(resource)

    def spread(self, metric: str) -> Spread | None:
        """Return median and spread over repeats and reruns; None if no good run has it."""
        return merge(
            [spread for run in self.ok_runs if (spread := run_spread(run, metric)) is not None]
        )

    def label(self, choices: Iterable[str]) -> str:
        """Say 'weights on NVMe, bfloat16, batch 8'."""
        return ", ".join(filter(None, (self._part(choice) for choice in choices)))

    def _part(self, choice: str) -> str:
        if choice == "dtype.weights":
            return self.dtype
        value = self.choices.get(choice, "")
        if not value:
            return ""
        if choice in ("model.name", "weights"):
            return value
        if choice == "offload.device":
            where = WEIGHTS_IN.get(value, value)
            return where if self.streams or value == "none" else f"{where} {NO_STREAM}"
        return f"{LABELS.get(choice) or choice.rpartition('.')[2]} {value}"


def run_spread(run: Run, metric: str) -> Spread | None:
    """Return the median of one run, and the spread of its timed repeats where it logged one."""
    if metric not in run.metrics:
        return None
    median = run.metrics[metric]
    return Spread(
        median=median,
        stddev=run.metrics.get(f"{metric}_stddev"),
        minimum=run.metrics.get(f"{metric}_min", median),
        maximum=run.metrics.get(f"{metric}_max", median),
        count=int(run.metrics.get("timed_runs", 1)),
    )
