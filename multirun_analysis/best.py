"""The fastest configuration of each model, why it is, and what holds it back."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from multirun_analysis.compare import same_circumstances, varied
from multirun_analysis.configuration import LATENCY, Configuration
from multirun_analysis.labels import column_order
from multirun_analysis.spread import Spread, format_bytes_per_s, format_spread, speedup
from zinfer.units import format_seconds

END_OF_BATCH = {
    "does_not_fit": "does not fit",
    "oom_device": "ran out of device memory",
    "oom_host": "ran out of host memory",
}


@dataclass(frozen=True, kw_only=True)
class Best:
    """The fastest measured configuration of a model, under one context and workload."""

    configuration: Configuration
    label: str
    rate: Spread
    reason: str
    limit: str
    low_latency: str | None
    """The configuration with the shortest step, where that is another one."""


def best_per_model(found: Sequence[Configuration]) -> tuple[Best, ...]:
    """Find the fastest of each model, workload and context, and say what holds it back."""
    names = [
        name
        for name in varied(found)
        if name not in ("model.name", "weights", "batch.prompt_tokens", "batch.new_tokens")
    ]
    names = sorted(
        {*names, "offload.device", "dtype.weights", "batch.batch_size"}, key=column_order
    )
    return tuple(
        best for _, group in same_circumstances(found) if (best := _best(group, names)) is not None
    )


def _best(group: Sequence[Configuration], names: Sequence[str]) -> Best | None:
    measured = sorted(
        (item for item in group if item.measured), key=lambda item: item.rate, reverse=True
    )
    if not measured:
        return None
    winner = measured[0]
    rate = winner.rate_spread
    assert rate is not None
    quickest = min(measured, key=lambda item: item.value(LATENCY) or float("inf"))
    return Best(
        configuration=winner,
        label=winner.label(names),
        rate=rate,
        reason=_reason(winner, rate, measured, len(group) - len(measured), names),
        limit=" ".join(limits(winner, group)),
        low_latency=None
        if quickest is winner
        else f"{format_seconds(quickest.value(LATENCY))} a token with {quickest.label(names)}",
    )


def _reason(
    winner: Configuration,
    rate: Spread,
    measured: Sequence[Configuration],
    unmeasured: int,
    names: Sequence[str],
) -> str:
    """Say 'Fastest of 24 measured (3 more were not); 1.8 ± 0.1 times the best with ...'."""
    counted = (
        f"fastest of {len(measured)} measured" if len(measured) > 1 else "the only one measured"
    )
    others = (
        f" ({unmeasured} more failed or {'was' if unmeasured == 1 else 'were'} only planned)"
        if unmeasured
        else ""
    )
    for name in ("offload.device", "dtype.weights", *names):
        rival = next((item for item in measured if item.chosen(name) != winner.chosen(name)), None)
        if rival is not None and (theirs := rival.rate_spread) is not None:
            ratio = speedup(rate, theirs)
            verdict = ", which is within the spread" if ratio.around_one else ""
            best_other = f"the best with {rival.label(names)}{verdict}"
            return f"{counted}{others}; {format_spread(ratio)} times {best_other}"
    return counted + others


def limits(item: Configuration, group: Sequence[Configuration]) -> Iterator[str]:
    """Yield what holds a configuration back: what binds it, and what ends a larger batch."""
    resource, fraction = item.binding_resource, item.value("ceiling_fraction")
    streamed = implied_bytes_per_s(item)
    if resource is not None:
        reached = f"; {fraction:.0%} of the ceiling is reached" if fraction is not None else ""
        yield f"{resource}{reached}."
    elif streamed is not None:
        yield (
            f"Moves {format_bytes_per_s(streamed)} of weights; no ceiling was logged, so what "
            "binds is not known."
        )
    else:
        yield "Not known: no ceiling was logged."
    bigger = [
        other
        for other in group
        if other.status in END_OF_BATCH and _differs_only_in_batch(item, other)
    ]
    if bigger:
        next_up = min(bigger, key=lambda other: other.batch_size or 0)
        yield f"Batch {next_up.batch_size} {END_OF_BATCH[next_up.status]}."


def _differs_only_in_batch(item: Configuration, other: Configuration) -> bool:
    same = {**item.choices, "batch.batch_size": ""} == {**other.choices, "batch.batch_size": ""}
    return (
        same and item.context == other.context and (other.batch_size or 0) > (item.batch_size or 0)
    )


def implied_bytes_per_s(item: Configuration) -> float | None:
    """Divide the weights' bytes by the time of a decode step, since each step reads them all once.

    The worker's own count of streamed bytes wins where it logged one: mixtures of experts touch
    only some weights. None where weights stay on the device.
    """
    if not item.streams:
        return None
    logged, size, step_s = (
        item.value("streamed_bytes_per_s"),
        item.value("weight_stored_bytes"),
        item.value(LATENCY),
    )
    if logged is not None:
        return logged
    return size / step_s if size and step_s else None


def pareto_front(points: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """Keep the points (cost, gain) that no other beats in both; sorted by cost.

    Args:
        points: less of the first is better (seconds, bytes), more of the second (tokens/s).
    """
    front: list[tuple[float, float]] = []
    for cost, gain in sorted(points, key=lambda point: (point[0], -point[1])):
        if not front or gain > front[-1][1]:
            front.append((cost, gain))
    return front
