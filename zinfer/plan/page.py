"""Answer on one page what people ask before a run: does it fit, how fast, what binds, what helps.

The lines are made from the JSON document of a plan, so that the driver needs no model.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from zinfer.job.outcome import Outcome
from zinfer.plan.binding import binding_words
from zinfer.plan.fit import LARGEST_BATCH_TRIED
from zinfer.units import format_bytes, format_seconds, format_times

SUGGESTIONS_SHOWN = 5


def page(outcome: Outcome) -> Iterator[str]:
    """Return the lines under the table of memory."""
    plan = outcome.plan
    assert plan is not None
    yield from fit_lines(plan)
    prediction, advice = plan.get("prediction") or {}, plan.get("advice") or {}
    yield from time_lines(prediction, advice)
    yield from byte_lines(prediction)
    yield from kv_lines(advice.get("kv_cache"))
    yield from fewer_bits_lines(advice.get("fewer_bits") or [])
    if "largest_batch_size" in advice:
        yield f"largest batch that fits: {_largest_batch(plan, advice['largest_batch_size'])}"
    helpful = advice.get("suggestions") or []
    if helpful:
        yield "what would help most (tokens/s, each alone):"
        for entry in helpful[:SUGGESTIONS_SHOWN]:
            yield f"  {entry['override']:<28} {_gain(entry)}"


def _gain(entry: Mapping[str, Any]) -> str:
    """Return the times that an override would make it faster, and the bytes that it would save."""
    gain = format_times(entry["gain"]) if entry["gain"] is not None else "fits"
    if entry["saved_bytes"] <= 0:
        return gain
    return f"{gain}, {format_bytes(entry['saved_bytes'])} less where it is tightest"


def _largest_batch(plan: Mapping[str, Any], largest: int | None) -> str:
    """Return the number, or why there is none."""
    if largest is None:
        return "none" if _checked(plan) else "unknown"
    return f"{LARGEST_BATCH_TRIED} and more" if largest >= LARGEST_BATCH_TRIED else str(largest)


def _checked(plan: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the tiers that are needed and whose size is known."""
    tiers = plan["tiers"].values()
    return [tier for tier in tiers if tier["available_bytes"] and tier["needed_bytes"]]


def _unchecked(plan: Mapping[str, Any]) -> list[str]:
    """Name needed tiers whose size is unknown and that no other tier includes."""
    tiers = plan["tiers"]
    elsewhere = {name for tier in tiers.values() for name in tier.get("includes", ())}
    return [
        name
        for name, tier in tiers.items()
        if tier["needed_bytes"] and tier["available_bytes"] is None and name not in elsewhere
    ]


def fit_lines(plan: Mapping[str, Any]) -> Iterator[str]:
    """Say if it fits, and by how much on the tier that decides."""
    short = [tier for tier in plan["tiers"].values() if not tier["fits"]]
    for problem in plan["problems"]:
        yield f"does not run: {problem}"
    for tier in short:
        needed, has = tier["needed_bytes"], tier["available_bytes"]
        yield (
            f"does not fit: {tier['name']} needs {format_bytes(needed)}, "
            f"has {format_bytes(has)}: {format_bytes(needed - has)} too little"
        )
    if short or plan["problems"]:
        return
    checked = _checked(plan)
    if not checked:
        yield "Cannot check the fit: this hardware's memory sizes are unknown."
        return
    tightest = max(checked, key=lambda tier: tier["needed_bytes"] / tier["available_bytes"])
    spare = tightest["available_bytes"] - tightest["needed_bytes"]
    yield (
        f"fits: {format_bytes(spare)} to spare on the tightest tier, "
        f"{tightest['name']} ({format_bytes(tightest['available_bytes'])})"
    )
    if unchecked := _unchecked(plan):
        yield f"not checked: {', '.join(unchecked)} (size unknown)"


def time_lines(prediction: Mapping[str, Any], advice: Mapping[str, Any]) -> Iterator[str]:
    """Write predicted times where the machine is calibrated, else the ceiling, and what binds."""
    best = prediction.get("ceiling_generated_tokens_per_s")
    if best is None:
        yield (
            "how fast: unknown, because no rate of this hardware is known. "
            "Run zinfer task=calibrate once on this machine, or set hardware=h100_2nvme"
        )
        return
    predicted = prediction.get("predicted_generated_tokens_per_s")
    for name, phase in (("prefill", "prefill"), ("decode step", "decode_step")):
        bound = prediction["ceilings"][phase]
        seconds = f"at best {format_seconds(bound['ceiling_s'])}"
        if predicted is not None:
            seconds = f"{format_seconds(prediction[f'predicted_{phase}_s'])}, {seconds}"
        yield f"{name:<12} {seconds}, bound by {binding_words(bound['binding'])}"
    rate = f"at best {best:.4g}" if predicted is None else f"{predicted:.4g}, at best {best:.4g}"
    binding = binding_words(prediction.get("binding_resource"))
    yield f"{'tokens/s':<12} {rate}, decode bound by {binding}"
    if predicted is None:
        yield f"at best: from the rates of {advice.get('rates_source') or 'published boxes'}"


def byte_lines(prediction: Mapping[str, Any]) -> Iterator[str]:
    """Return the bytes that one new token moves over each resource, of those that it uses."""
    moved = prediction.get("decode_bytes_per_token") or {}
    if moved:
        parts = [f"{format_bytes(count)} ({binding_words(name)})" for name, count in moved.items()]
        yield f"{'a new token':<12} moves {', '.join(parts)}"


def kv_lines(advice: Mapping[str, Any] | None) -> Iterator[str]:
    """Return a table of the places for the KV cache, and which is fastest."""
    if not advice:
        return
    yield "where the KV cache could be:"
    yield f"  {'kv_cache':<25}{'tokens/s':<10}{'prefill':<13}{'step':<13}{'device':<12}host"
    for entry in advice["placements"]:
        bits = "" if entry["bits"] == 16 else f", {entry['bits']} bits"
        rate = "-" if entry["tokens_per_s"] is None else f"{entry['tokens_per_s']:.4g}"
        star = "*" if entry["leaves_out_host_memory"] else ""
        yield (
            f"  {entry['placement'] + bits:<25}{rate + star:<10}"
            f"{format_seconds(entry['prefill_s']):<13}{format_seconds(entry['decode_step_s']):<13}"
            f"{format_bytes(entry['device_bytes']):<12}{format_bytes(entry['host_bytes'])}"
            f"{'' if entry['fits'] else ' does not fit'}"
        )
    if any(entry["leaves_out_host_memory"] for entry in advice["placements"]):
        yield "  * without what host memory takes: its rate is unknown"
    yield f"  {advice['why']}"


def fewer_bits_lines(options: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Return a table of weights in fewer bits: what they gain here, and what the text loses.

    All is given as a multiple of what the unquantised model has.
    """
    if not options:
        return
    rates = "as predicted" if options[0]["is_predicted"] else "at best"
    over = options[0]["over"]
    yield f"weights in fewer bits, over {over} (tokens/s {rates}; stored bytes; perplexity):"
    for entry in options:
        gain = entry["gain"]
        speed = "speed unknown" if gain is None else f"{format_times(gain)} as fast"
        stored = f"{format_bytes(entry['stored_bytes'])} ({entry['stored_share']:.2f} of it)"
        text = f"perplexity {_times(entry)}" if entry["is_own_quality"] else "perplexity unknown"
        yield (
            f"  {entry['override']:<13}{speed:<21}{stored:<27}{text}"
            f"{'' if entry['fits'] else '; does not fit'}"
            f"{'; this run' if entry['is_this_run'] else ''}"
        )
    unpacked = [entry for entry in options if entry["gain_unpacked"] is not None]
    if unpacked:
        gains = ", ".join(f"{each['override']} {each['gain_unpacked']:.2f}" for each in unpacked)
        yield f"  by zinfer's Triton kernel; where the GPU refuses it and unpacks: {gains} times"
    if any(entry["gain"] is not None and entry["gain"] < 1 for entry in options):
        yield "  less than 1 times as fast: unpacking at each use costs more than fewer bytes save"
    yield from _other_models(options)


def _other_models(options: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Say what other models' texts lost, where this model's was not measured."""
    others = [entry for entry in options if not entry["is_own_quality"]]
    models = sorted({row["model"] for entry in others for row in entry["quality"]})
    if not others:
        return
    yield "  This model's text was not scored: set weights=pretrained quality.enabled=true"
    if models:
        known = "; ".join(
            f"{entry['override']} {_times(entry)}" for entry in others if entry["quality"]
        )
        yield f"  {' and '.join(models)} (small models lose most): perplexity {known}"


def _times(entry: Mapping[str, Any]) -> str:
    """Return the perplexities that were measured, over the unquantised model's: 'x 1.69'."""
    how = {"nearest": "", "searched": f" with {entry['override']}_searched"}
    return ", ".join(
        f"x {row['perplexity_ratio']:.3g}{how[row['rounding']]}" for row in entry["quality"]
    )


def verdict_line(outcome: Outcome) -> str | None:
    """Put what was predicted beside what was measured. None where nothing was predicted."""
    metrics = outcome.metrics
    measured = metrics.get("generated_tokens_per_s")
    best = metrics.get("ceiling_generated_tokens_per_s")
    if measured is None or best is None:
        return None
    predicted = metrics.get("predicted_generated_tokens_per_s")
    said = f"predicted {predicted:.4g} tokens/s, " if predicted is not None else ""
    binding = ((outcome.plan or {}).get("prediction") or {}).get("binding_resource")
    return (
        f"{said}measured {measured:.4g}: {measured / best:.0%} of the ceiling of {best:.4g}; "
        f"bound by {binding_words(binding)}"
    )
