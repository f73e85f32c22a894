"""Speed-ups: each measured configuration over the one that differs in a single choice."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multirun_analysis.configuration import Configuration
from multirun_analysis.labels import LABELS
from multirun_analysis.spread import Spread, speedup

BASELINES = (
    ("offload.device", ("none", "cpu", "nvme")),
    ("dtype.weights", ("float32", "bfloat16", "float16", "auto", "int8", "int4")),
    ("kv_cache.placement", ("device", "host")),
    ("zero.derivation", ("paper", "tuned")),
    ("engine.name", ("resident", "zero")),
    ("offload.use_gds", ("false", "true")),
    ("batch.batch_size", ()),
)
"""Choices that a speed-up is usually asked against, the first that varies first.

Each with the values to prefer as its baseline; () means the smallest value."""


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
    """Parse `offload.device=none`; the group's name alone (`offload=none`) will do.

    Raises:
        ValueError: not of that form.
    """
    name, equals, value = text.partition("=")
    full = {choice.split(".")[0]: choice for choice in reversed(LABELS)} | {
        "batch": "batch.batch_size"
    }
    if not equals or not name or not value:
        raise ValueError(f"--baseline {text} is no choice. Set --baseline offload.device=none")
    return Baseline(name=full.get(name, name), value=value)


def default_baseline(found: Sequence[Configuration]) -> Baseline | None:
    """Choose what a speed-up is asked against: the first of BASELINES that varies.

    Of its values the one that most others can be divided by; None where nothing varies.
    """
    measured = [item for item in found if item.measured]
    for name, preferred in BASELINES:
        values = sorted(
            {item.chosen(name) for item in measured},
            key=lambda value: (*_preference(value, preferred), value),
        )
        if len(values) > 1:
            candidates = [Baseline(name=name, value=value) for value in values]
            return max(
                candidates,
                key=lambda baseline: sum(_compares(item) for item in ratios(measured, baseline)),
            )
    return None


def _preference(value: str, preferred: Sequence[str]) -> tuple[int, float]:
    """Sort the preferred ones first, in their order, then numbers from the smallest."""
    number = float(value) if value.replace(".", "", 1).isdecimal() else float("inf")
    return (preferred.index(value) if value in preferred else len(preferred), number)


def _compares(item: Ratio) -> bool:
    return item.ratio is not None and item.reference is not item.candidate


def ratios(found: Sequence[Configuration], baseline: Baseline) -> tuple[Ratio, ...]:
    """Divide each measured configuration by the baseline that equals it in everything else."""
    references: dict[tuple[object, ...], Configuration] = {}
    for item in found:
        if item.chosen(baseline.name) == baseline.value:
            key = _others(item, baseline)
            references[key] = max(item, references.get(key, item), key=lambda one: one.rate)
    return tuple(
        _ratio(item, references.get(_others(item, baseline)), baseline)
        for item in found
        if item.measured
    )


def _ratio(candidate: Configuration, reference: Configuration | None, baseline: Baseline) -> Ratio:
    mine, theirs = candidate.rate_spread, reference.rate_spread if reference else None
    assert mine is not None
    if reference is candidate:  # exactly 1, whatever its spread
        itself = Spread(median=1.0, stddev=None, minimum=1.0, maximum=1.0, count=mine.count)
        return Ratio(candidate=candidate, reference=reference, ratio=itself, missing=None)
    if theirs is not None:
        return Ratio(
            candidate=candidate, reference=reference, ratio=speedup(mine, theirs), missing=None
        )
    missing = (
        f"no run with {baseline} and all else equal"
        if reference is None
        else f"{baseline}: {reference.status}"
    )
    return Ratio(candidate=candidate, reference=reference, ratio=None, missing=missing)


def _others(item: Configuration, baseline: Baseline) -> tuple[object, ...]:
    """Return all but the baseline's own group: offload.pin_memory goes with offload.device.

    A batch's lengths do not go with its size.
    """
    group = baseline.name.split(".")[0] + "."
    own = (
        {baseline.name}
        if group == "batch."
        else {name for name in item.choices if name.startswith(group)}
    )
    return (
        item.context,
        tuple(sorted((name, value) for name, value in item.choices.items() if name not in own)),
    )
