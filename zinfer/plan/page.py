"""One page for people who ask before they run: does it fit, how fast will it be, what binds, and what would help."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from zinfer.job.outcome import Outcome
from zinfer.plan.fit import LARGEST_BATCH_TRIED
from zinfer.units import format_bytes, format_seconds, format_times

BINDING = {
    "device_compute": "arithmetic of the device",
    "device_memory": "device memory",
    "host_device_link": "the link between host and device",
    "nvme": "NVMe",
    "host_memory": "host memory",
    "fixed_cost": "the fixed cost of each layer",
}
SUGGESTIONS_SHOWN = 5


def page(outcome: Outcome) -> Iterator[str]:
    """The lines under the table of memory."""
    plan = outcome.plan
    assert plan is not None
    yield from fit_lines(plan)
    prediction, advice = plan.get("prediction") or {}, plan.get("advice") or {}
    yield from time_lines(prediction, advice)
    if "largest_batch_size" in advice:
        largest = advice["largest_batch_size"]
        more = f"{LARGEST_BATCH_TRIED} and more"
        said = "none" if largest is None else more if largest >= LARGEST_BATCH_TRIED else largest
        yield f"largest batch that fits: {said}"
    helpful = advice.get("suggestions") or []
    if helpful:
        yield "what would help most (tokens/s, each alone):"
        for entry in helpful[:SUGGESTIONS_SHOWN]:
            saved = (
                f", {format_bytes(entry['saved_bytes'])} less where it is tightest"
                if entry["saved_bytes"] > 0
                else ""
            )
            gain = format_times(entry["gain"]) if entry["gain"] is not None else "fits"
            yield f"  {entry['override']:<28} {gain}{saved}"


def fit_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Yes or no, and by how much on the tier that decides."""
    short = [tier for tier in plan["tiers"].values() if not tier["fits"]]
    for problem in plan["problems"]:
        yield f"does not run: {problem}"
    for tier in short:
        lacking = tier["needed_bytes"] - tier["available_bytes"]
        yield (
            f"does not fit: {tier['name']} needs {format_bytes(tier['needed_bytes'])}, has {format_bytes(tier['available_bytes'])}: "
            f"{format_bytes(lacking)} too little"
        )
    known = [
        tier for tier in plan["tiers"].values() if tier["available_bytes"] and tier["needed_bytes"]
    ]
    if not short and not plan["problems"]:
        if not known:
            yield "fits, as far as is known: no capacity of this hardware is"
            return
        tightest = max(known, key=lambda tier: tier["needed_bytes"] / tier["available_bytes"])
        spare = tightest["available_bytes"] - tightest["needed_bytes"]
        yield f"fits: {format_bytes(spare)} to spare on the tightest tier, {tightest['name']} ({format_bytes(tightest['available_bytes'])})"


def time_lines(prediction: Mapping[str, Any], advice: Mapping[str, Any]) -> Iterator[str]:
    """Predicted times where the machine is calibrated, else the ceiling, and what binds."""
    ceilings = prediction.get("ceilings") or {}
    if prediction.get("ceiling_generated_tokens_per_s") is None:
        yield "how fast: unknown, no rate of this hardware is. Type zinfer task=calibrate once on this machine, or hardware=h100_2nvme"
        return
    calibrated = "predicted_generated_tokens_per_s" in prediction
    for name, phase in (("prefill", "prefill"), ("decode step", "decode_step")):
        bound = ceilings[phase]
        at_best = format_seconds(bound["ceiling_s"])
        predicted = (
            f"{format_seconds(prediction[f'predicted_{phase}_s'])}, at best {at_best}"
            if calibrated
            else f"at best {at_best}"
        )
        yield f"{name:<12} {predicted}, bound by {BINDING.get(str(bound['binding']), '-')}"
    best = prediction["ceiling_generated_tokens_per_s"]
    rate = (
        f"{prediction['predicted_generated_tokens_per_s']:.4g}, at best {best:.4g}"
        if calibrated
        else f"at best {best:.4g}"
    )
    yield f"{'tokens/s':<12} {rate}, decode bound by {BINDING.get(str(prediction.get('binding_resource')), '-')}"
    if not calibrated:
        source = advice.get("rates_source")
        yield f"at best: from the rates of {source}" if source else "at best: from published rates"


def verdict_line(outcome: Outcome) -> str | None:
    """After a run: what was predicted beside what was measured; None where nothing was predicted."""
    metrics = outcome.metrics
    measured, best = (
        metrics.get("generated_tokens_per_s"),
        metrics.get("ceiling_generated_tokens_per_s"),
    )
    if measured is None or best is None:
        return None
    predicted = metrics.get("predicted_generated_tokens_per_s")
    said = f"predicted {predicted:.4g} tokens/s, " if predicted is not None else ""
    binding = ((outcome.plan or {}).get("prediction") or {}).get("binding_resource")
    return f"{said}measured {measured:.4g}: {measured / best:.0%} of the ceiling of {best:.4g}; bound by {BINDING.get(str(binding), '-')}"
