"""Runs -> configurations with median and spread -> ratios with their error. Pure: the same runs give the same comparison."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from math import hypot, sqrt

from multirun_analysis.read import Run

RATE = "generated_tokens_per_s"
"""The metric that configurations are ranked by."""
LATENCY = "decode_step_s"

LABELS = {
    "model.name": "model",
    "weights": "weights",
    "offload.device": "weights on",
    "dtype.weights": "dtype",
    "kv_cache.placement": "KV on",
    "batch.batch_size": "batch",
    "batch.prompt_tokens": "prompt",
    "batch.new_tokens": "new",
    "zero.derivation": "zero",
    "engine.name": "engine",
    "launcher.ranks": "ranks",
}
"""Parameter -> what a table calls it, in the order of the columns. Other parameters go by their own name."""
ALWAYS_SHOWN = ("model.name", "offload.device", "dtype.weights", "batch.batch_size", "batch.prompt_tokens", "batch.new_tokens")
NOT_CHOICES = frozenset({"task", "batch.seed", "plan.enforce", "plan.headroom", "hardware.name", "sweep.parent_run_id"})
"""Parameters that do not tell configurations apart in a table. The memory plan's knobs decide whether a run starts, not how fast it is."""
CIRCUMSTANCES = {"weights": "kinds of weights", "hardware": "machines", "commit": "commits", "method_version": "method versions"}
"""Field of Context -> what several of it are called."""
OUT_OF_MEMORY = ("does_not_fit", "oom_device", "oom_host")
BASELINES = (
    ("offload.device", ("none", "cpu", "nvme")),
    ("dtype.weights", ("float32", "bfloat16", "float16", "auto", "int8", "int4")),
    ("kv_cache.placement", ("device", "host")),
    ("zero.derivation", ("paper", "tuned")),
    ("engine.name", ("resident", "zero")),
    ("offload.use_gds", ("false", "true")),
    ("batch.batch_size", ()),
)
"""What a speed-up is usually asked against, first what varies first; () means the smallest value."""


@dataclass(frozen=True, kw_only=True)
class Spread:
    """A number with how far it moved."""

    median: float
    stddev: float | None
    """None: measured once."""
    minimum: float
    maximum: float
    count: int
    """Timed values behind it."""

    @property
    def relative(self) -> float | None:
        """Standard deviation over median."""
        return None if self.stddev is None or self.median == 0 else self.stddev / abs(self.median)


@dataclass(frozen=True, kw_only=True, order=True)
class Context:
    """The circumstances of a run. Numbers of different contexts are never averaged and never divided by each other."""

    weights: str
    """dummy or pretrained."""
    hardware: str
    """Fingerprint of the machine."""
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
        return tuple(run for run in self.runs if run.status == "ok")

    @cached_property
    def failed_runs(self) -> tuple[Run, ...]:
        return tuple(run for run in self.runs if run.status not in ("ok", "planned"))

    @cached_property
    def status(self) -> str:
        """ok once one run of it ended well, otherwise what the newest came to."""
        return "ok" if self.ok_runs else self.runs[-1].status

    @cached_property
    def reason(self) -> str | None:
        """Why the newest failed run failed."""
        return next((run.reason for run in reversed(self.failed_runs) if run.reason), None)

    @property
    def measured(self) -> bool:
        return self.spread(RATE) is not None

    @property
    def newest(self) -> Run:
        return (self.ok_runs or self.runs)[-1]

    @property
    def model(self) -> str:
        return self.choices.get("model.name", "unknown")

    @property
    def offload(self) -> str:
        return self.choices.get("offload.device", "unknown")

    @cached_property
    def dtype(self) -> str:
        """How weights are stored; what `auto` came to."""
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
        return self.number("batch.batch_size")

    def number(self, choice: str) -> int | None:
        """A choice that is a whole number."""
        text = self.choices.get(choice, "")
        return int(text) if text.isdecimal() else None

    def value(self, metric: str) -> float | None:
        """Median over the runs that ended well; over all runs for what is known before a run starts."""
        runs = self.ok_runs or self.runs
        values = [run.metrics[metric] for run in runs if metric in run.metrics]
        return statistics.median(values) if values else None

    def tag(self, name: str) -> str | None:
        """Of the newest run that has it."""
        return next((run.tags[name] for run in reversed(self.ok_runs or self.runs) if name in run.tags), None)

    def spread(self, metric: str) -> Spread | None:
        """Median and spread over repeats and reruns; None if no run that ended well measured it."""
        return merge([spread for run in self.ok_runs if (spread := run_spread(run, metric)) is not None])

    def label(self, choices: Iterable[str]) -> str:
        """'nvme, bfloat16, batch 8'."""
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
            return {"none": "all on device", "cpu": "weights in host memory", "nvme": "weights on NVMe"}.get(value, value)
        return f"{LABELS.get(choice, choice)} {value}"


def run_spread(run: Run, metric: str) -> Spread | None:
    """What one run says of a metric: its median, and the spread of its timed repeats where it logged one."""
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


def merge(spreads: Sequence[Spread]) -> Spread | None:
    """Reruns as one number: the median of the medians; variance within runs and between them add up (law of total variance)."""
    if not spreads:
        return None
    medians = [spread.median for spread in spreads]
    within = [spread.stddev**2 for spread in spreads if spread.stddev is not None]
    parts = [*([statistics.fmean(within)] if within else []), *([statistics.variance(medians)] if len(medians) > 1 else [])]
    return Spread(
        median=statistics.median(medians),
        stddev=sqrt(sum(parts)) if parts else None,
        minimum=min(spread.minimum for spread in spreads),
        maximum=max(spread.maximum for spread in spreads),
        count=sum(spread.count for spread in spreads),
    )


def scaled(spread: Spread, factor: float) -> Spread:
    """In another unit."""
    stddev = None if spread.stddev is None else spread.stddev * factor
    return Spread(
        median=spread.median * factor, stddev=stddev, minimum=spread.minimum * factor, maximum=spread.maximum * factor, count=spread.count
    )


def speedup(candidate: Spread, reference: Spread) -> Spread:
    """Ratio of two rates, with the first-order error of a quotient of independents.

    Source: Taylor, An Introduction to Error Analysis, 2nd edition 1997, section 3.4: relative errors add in quadrature.
    Unknown when either error is.
    """
    ratio = candidate.median / reference.median
    relative = hypot(candidate.relative, reference.relative) if candidate.relative is not None and reference.relative is not None else None
    return Spread(
        median=ratio,
        stddev=None if relative is None else ratio * relative,
        minimum=candidate.minimum / reference.maximum,
        maximum=candidate.maximum / reference.minimum if reference.minimum else ratio,
        count=min(candidate.count, reference.count),
    )


# Configurations


def configurations(runs: Iterable[Run]) -> tuple[Configuration, ...]:
    """Runs of the same choices under the same circumstances, together; in the order in which they first ran."""
    groups: dict[tuple[object, ...], list[Run]] = {}
    for run in runs:
        choices = tuple(sorted(_choices(run).items()))
        groups.setdefault((run.params.get("task"), choices, context(run)), []).append(run)
    return tuple(Configuration(_choices(group[0]), context(group[0]), tuple(group)) for group in groups.values())


def context(run: Run) -> Context:
    """The circumstances of a run, `unknown` where it does not say."""
    tag = run.tags.get
    return Context(
        weights=run.params.get("weights", "unknown"),
        hardware=tag("zinfer.hardware", "unknown"),
        device=tag("zinfer.device", "unknown"),
        commit=tag("zinfer.commit", "unknown"),
        dirty=tag("zinfer.dirty", "unknown"),
        method_version=run.method_version,
    )


def _choices(run: Run) -> dict[str, str]:
    return {name: value for name, value in run.params.items() if name not in NOT_CHOICES}


def varied(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Choices that differ among these, in the order of LABELS; what only follows from the model's name is left out."""
    names = {name for item in found for name in item.choices if not (name.startswith("model.") and name != "model.name")}
    differing = {name for name in names if len({item.choices.get(name) for item in found}) > 1}
    follows = {name for name in differing if name not in LABELS and _follows_from_group(name, found)}
    return tuple(sorted(differing - follows, key=_column_order))


def _follows_from_group(name: str, found: Sequence[Configuration]) -> bool:
    """A setting that has one value for each choice of its own group (dtype.compute of dtype.weights): no choice of its own."""
    main = next((label for label in LABELS if label.split(".")[0] == name.split(".")[0]), None)
    if main is None:
        return False
    seen: dict[str | None, set[str | None]] = {}
    for item in found:
        seen.setdefault(item.choices.get(main), set()).add(item.choices.get(name))
    return all(len(values) == 1 for values in seen.values())


def shown_choices(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Columns of a table: what varies, and what a reader asks for first."""
    return tuple(sorted({*varied(found), *ALWAYS_SHOWN}, key=_column_order))


def _column_order(name: str) -> tuple[int, str]:
    order = list(LABELS)
    return (order.index(name) if name in LABELS else len(order), name)


def mixtures(found: Sequence[Configuration]) -> list[str]:
    """One sentence for each circumstance that differs among these runs."""
    sentences = []
    contexts = {item.context for item in found}
    rule = "kept apart: never averaged together, never divided by each other."
    for field_name, noun in CIRCUMSTANCES.items():
        values = sorted({getattr(item, field_name) for item in contexts})
        if len(values) > 1:
            named = [value[:7] if field_name == "commit" else value for value in values]
            if field_name == "hardware":
                named = sorted({item.device for item in contexts})
            shown = ", ".join(named[:6]) + (", ..." if len(named) > 6 else "")
            sentences.append(f"Runs of {len(values)} {noun} are here ({shown}), {rule}")
    dirty = [item for item in found if item.context.dirty == "true"]
    if dirty:
        sentences.append(
            f"{len(dirty)} of {len(found)} configurations ran from a changed working tree (marked *): their commit alone does not "
            "reproduce them."
        )
    dummy = sum(item.context.weights == "dummy" for item in found)
    if dummy == len(found):
        sentences.append("All weights are dummy (random): speed and memory are those of the architecture, the text means nothing.")
    return sentences


# Ratios


@dataclass(frozen=True, kw_only=True)
class Baseline:
    """A choice that others are compared with: `offload.device=none`."""

    name: str
    value: str

    def __str__(self) -> str:
        return f"{self.name}={self.value}"


@dataclass(frozen=True, kw_only=True)
class Ratio:
    """One configuration against the baseline that is equal in everything else."""

    candidate: Configuration
    reference: Configuration | None
    ratio: Spread | None
    missing: str | None
    """Why there is no ratio."""


def parse_baseline(text: str) -> Baseline:
    """`offload.device=none`, `dtype.weights=bfloat16`; the group's name alone (`offload=none`) will do.

    Raises:
        ValueError: not of that form.
    """
    name, equals, value = text.partition("=")
    full = {choice.split(".")[0]: choice for choice in reversed(LABELS)} | {"batch": "batch.batch_size"}
    if not equals or not name or not value:
        raise ValueError(f"--baseline {text} is no choice. Type --baseline offload.device=none")
    return Baseline(name=full.get(name, name), value=value)


def default_baseline(found: Sequence[Configuration]) -> Baseline | None:
    """The choice that people ask a speed-up against: the first of BASELINES that was measured with more than one value."""
    for name, preferred in BASELINES:
        values = {item.choices[name] for item in found if item.measured and name in item.choices}
        if len(values) > 1:
            smallest = min(values, key=lambda value: (float(value) if value.replace(".", "", 1).isdecimal() else float("inf"), value))
            return Baseline(name=name, value=next((value for value in preferred if value in values), smallest))
    return None


def ratios(found: Sequence[Configuration], baseline: Baseline) -> tuple[Ratio, ...]:
    """Each measured configuration over the baseline that equals it in every other group of choices and in its circumstances."""
    references: dict[tuple[object, ...], Configuration] = {}
    for item in found:
        if _value(item, baseline.name) == baseline.value:
            key = _others(item, baseline)
            if key not in references or _rate(item) > _rate(references[key]):
                references[key] = item
    return tuple(_ratio(item, references.get(_others(item, baseline)), baseline) for item in found if item.measured)


def _ratio(candidate: Configuration, reference: Configuration | None, baseline: Baseline) -> Ratio:
    mine, theirs = candidate.spread(RATE), reference.spread(RATE) if reference else None
    assert mine is not None
    if theirs is not None:
        return Ratio(candidate=candidate, reference=reference, ratio=speedup(mine, theirs), missing=None)
    missing = f"no run with {baseline} and all else equal" if reference is None else f"{baseline}: {reference.status}"
    return Ratio(candidate=candidate, reference=reference, ratio=None, missing=missing)


def _value(item: Configuration, name: str) -> str | None:
    return item.dtype if name == "dtype.weights" else item.choices.get(name)


def _others(item: Configuration, baseline: Baseline) -> tuple[object, ...]:
    """Everything but the baseline's own group: offload.pin_memory goes with offload.device. A batch's lengths do not go with its size."""
    group = baseline.name.split(".")[0] + "."
    own = {baseline.name} if group == "batch." else {name for name in item.choices if name.startswith(group)}
    return (item.context, tuple(sorted((name, value) for name, value in item.choices.items() if name not in own)))


def _rate(item: Configuration) -> float:
    spread = item.spread(RATE)
    return spread.median if spread else 0.0


# The best


@dataclass(frozen=True, kw_only=True)
class Best:
    """The fastest measured configuration of a model under one set of circumstances and one workload."""

    configuration: Configuration
    label: str
    rate: Spread
    reason: str
    limit: str
    low_latency: str | None
    """The configuration with the shortest step, where that is another one."""


def best_per_model(found: Sequence[Configuration]) -> tuple[Best, ...]:
    """One for each model, workload and context, with why it is the best and what holds it back."""
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for item in found:
        groups.setdefault((item.model, item.context, item.workload), []).append(item)
    names = [name for name in varied(found) if name not in ("model.name", "weights", "batch.prompt_tokens", "batch.new_tokens")]
    names = sorted({*names, "offload.device", "dtype.weights", "batch.batch_size"}, key=_column_order)
    return tuple(best for key in sorted(groups, key=str) if (best := _best(groups[key], names)) is not None)


def _best(group: Sequence[Configuration], names: Sequence[str]) -> Best | None:
    measured = sorted((item for item in group if item.measured), key=_rate, reverse=True)
    if not measured:
        return None
    winner = measured[0]
    rate = winner.spread(RATE)
    assert rate is not None
    quickest = min(measured, key=lambda item: item.value(LATENCY) or float("inf"))
    return Best(
        configuration=winner,
        label=winner.label(names),
        rate=rate,
        reason=_reason(winner, rate, measured, len(group) - len(measured), names),
        limit=" ".join(limits(winner, group)),
        low_latency=None if quickest is winner else f"{_milliseconds(quickest.value(LATENCY))} a token with {quickest.label(names)}",
    )


def _reason(winner: Configuration, rate: Spread, measured: Sequence[Configuration], unmeasured: int, names: Sequence[str]) -> str:
    """'Fastest of 24 measured (3 more were not); 1.8 ± 0.1 times the best with ...'."""
    counted = f"fastest of {len(measured)} measured" if len(measured) > 1 else "the only one measured"
    others = f" ({unmeasured} more failed or {'was' if unmeasured == 1 else 'were'} only planned)" if unmeasured else ""
    for name in ("offload.device", "dtype.weights", *names):
        rival = next((item for item in measured if _value(item, name) != _value(winner, name)), None)
        if rival is not None and (theirs := rival.spread(RATE)) is not None:
            ratio = speedup(rate, theirs)
            same = ratio.stddev is not None and ratio.median - ratio.stddev <= 1
            verdict = ", which is within the spread" if same else ""
            return f"{counted}{others}; {format_spread(ratio)} times the best with {rival.label(names)}{verdict}"
    return counted + others


def limits(item: Configuration, group: Sequence[Configuration]) -> Iterator[str]:
    """Sentences on what holds a configuration back: the resource that binds, and the memory that ends the batch."""
    resource, fraction = item.tag("zinfer.binding_resource"), item.value("ceiling_fraction")
    streamed = implied_bytes_per_s(item)
    if resource is not None:
        at = f", at {fraction:.0%} of what it allows" if fraction is not None else ""
        yield f"{resource}{at}."
    elif streamed is not None:
        yield f"Moves {streamed / 1e9:.3g} GB/s of weights; no ceiling was logged, so what binds is not known."
    else:
        yield "Not known: no ceiling was logged."
    bigger = [other for other in group if other.status in OUT_OF_MEMORY and _differs_only_in_batch(item, other)]
    if bigger:
        next_up = min(bigger, key=lambda other: other.batch_size or 0)
        yield f"Batch {next_up.batch_size} does not fit ({next_up.status})."


def _differs_only_in_batch(item: Configuration, other: Configuration) -> bool:
    same = {**item.choices, "batch.batch_size": ""} == {**other.choices, "batch.batch_size": ""}
    return same and item.context == other.context and (other.batch_size or 0) > (item.batch_size or 0)


def implied_bytes_per_s(item: Configuration) -> float | None:
    """Weight bytes over the time of a decode step: each step reads every weight once. None where weights stay on the device.

    The worker's own count of streamed bytes wins where it logged one (mixtures of experts touch only some weights).
    """
    if item.offload == "none":
        return None
    logged, size, step_s = item.value("streamed_bytes_per_s"), item.value("weight_bytes"), item.value(LATENCY)
    if logged is not None:
        return logged
    return size / step_s if size and step_s else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Of (latency, rate): those that no other beats in both; sorted by latency."""
    front: list[tuple[float, float]] = []
    for latency, rate in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or rate > front[-1][1]:
            front.append((latency, rate))
    return front


# Numbers for people


def format_number(value: float | None, digits: int = 3) -> str:
    """Three significant digits, no exponent: '0.0123', '4.21', '1,230'; unknown is '-'."""
    if value is None:
        return "-"
    if value == 0:
        return "0"
    rounded = float(f"{value:.{digits}g}")
    decimals = max(0, digits - 1 - _magnitude(rounded))
    return f"{rounded:,.{decimals}f}"


def format_spread(spread: Spread | None) -> str:
    """'4.21 ± 0.05': the error with two digits, the number with as many decimals."""
    if spread is None:
        return "-"
    if not spread.stddev:
        return format_number(spread.median)
    decimals = max(0, 1 - _magnitude(spread.stddev))
    if decimals > max(0, 4 - _magnitude(spread.median)):  # an error far below the fourth digit
        return f"{format_number(spread.median, 4)} ± {format_number(spread.stddev, 1)}"
    return f"{spread.median:,.{decimals}f} ± {spread.stddev:,.{decimals}f}"


def _magnitude(value: float) -> int:
    """Power of ten of the first digit."""
    return int(f"{value:e}".partition("e")[2]) if value else 0


def _milliseconds(seconds: float | None) -> str:
    if seconds is None:
        return "-"
    return f"{format_number(seconds * 1e3)} ms" if seconds < 1 else f"{format_number(seconds)} s"
