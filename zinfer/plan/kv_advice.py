"""Compare the places for the KV cache: plan each, in 16, 8 and 4 bits, and say which is fastest."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from zinfer.config import RunConfig
from zinfer.config.engines import engine_of
from zinfer.config.setting_groups import KvBits, KvPlacementName
from zinfer.job.outcome import Json
from zinfer.plan.binding import binding_words
from zinfer.plan.kv_placement import kv_problems
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.problems import spec_problems
from zinfer.units import format_seconds

PLACEMENTS: tuple[KvPlacementName, ...] = ("device", "host", "host_attention")
BITS: tuple[KvBits, ...] = (16, 8, 4)
SAME_SPEED = 1.02
"""Placements whose tokens/s differ by less than this count as equally fast."""


@dataclass(frozen=True, kw_only=True)
class PlacedKv:
    """One placement of the KV cache, planned."""

    placement: KvPlacementName
    bits: KvBits
    run: Planned

    @property
    def override(self) -> str:
        """Return the settings that choose it."""
        bits = "" if self.bits == 16 else f" kv_cache.bits={self.bits}"
        return f"kv_cache={self.placement}{bits}"

    @property
    def tokens_per_s(self) -> float | None:
        """Predicted; from the ceiling where nothing is calibrated."""
        prediction = self.run.prediction
        return prediction.generated_tokens_per_s or prediction.ceiling.generated_tokens_per_s

    @property
    def decode_step_s(self) -> float | None:
        """Predicted; from the ceiling where nothing is calibrated."""
        prediction = self.run.prediction
        return prediction.decode_step_s or prediction.ceiling.decode_step.ceiling_s

    @property
    def prefill_s(self) -> float | None:
        """Predicted; from the ceiling where nothing is calibrated."""
        prediction = self.run.prediction
        return prediction.prefill_s or prediction.ceiling.prefill.ceiling_s

    @property
    def leaves_out_host_memory(self) -> bool:
        """True where a step reads the cache in host memory, whose rate is not known."""
        return (
            self.placement == "host_attention"
            and not self.run.hardware.device_is_host
            and self.run.hardware.host_memory_bytes_per_s is None
        )

    def document(self) -> Json:
        """Return JSON-able values."""
        plan = self.run.plan
        return {
            "override": self.override,
            "placement": self.placement,
            "bits": self.bits,
            "tokens_per_s": self.tokens_per_s,
            "predicted": self.run.prediction.generated_tokens_per_s is not None,
            "prefill_s": self.prefill_s,
            "decode_step_s": self.decode_step_s,
            "binding": self.run.prediction.binding_resource,
            "fits": self.run.fits,
            "device_bytes": plan.tier("device").needed_bytes,
            "host_bytes": plan.tier("host").needed_bytes,
            "leaves_out_host_memory": self.leaves_out_host_memory,
        }


def with_kv(config: RunConfig, placement: KvPlacementName, bits: KvBits = 16) -> RunConfig:
    """Return the same run with its KV cache elsewhere."""
    kv = replace(config.kv_cache, placement=placement, bits=bits, key_bits=None, value_bits=None)
    if placement == "device":
        kv = replace(kv, device_layers=0, pin_memory=None, kernel="auto")
    return replace(config, kv_cache=kv)


def can_place(run: Planned, config: RunConfig) -> bool:
    """Tell if this engine and model can keep the KV cache as configured."""
    return config.kv_cache.placement in engine_of(config).kv_placements and not list(
        kv_problems(run.spec, config)
    )


def kv_placements(run: Planned) -> Iterator[PlacedKv]:
    """Plan every placement that this engine and model can have; nothing if there is no choice."""
    if run.spec.kv_layers is None or spec_problems(run.spec, run.config):
        return
    found = []
    for placement in PLACEMENTS:
        for bits in BITS if placement != "device" else BITS[:1]:
            config = with_kv(run.config, placement, bits)
            if can_place(run, config):
                planned = plan_run(config, run.hardware, run.spec)
                found.append(PlacedKv(placement=placement, bits=bits, run=planned))
    if len(found) > 1:
        yield from found


def kv_document(run: Planned) -> Json | None:
    """Compare the placements for task=plan. None: there is no choice."""
    placed = list(kv_placements(run))
    if not placed:
        return None
    fastest = fastest_of(placed)
    return {
        "placements": [entry.document() for entry in placed],
        "fastest": None if fastest is None else fastest.override,
        "why": why(placed, fastest),
    }


def fastest_of(placed: list[PlacedKv]) -> PlacedKv | None:
    """Return the fastest that fits and whose rates are known. None: no rate is known, none fits.

    Codes change what the model says, so they count only where nothing fits in 16 bits.
    Of equals the first counts: on the device nothing has to be copied.
    """
    known = [
        entry
        for entry in placed
        if entry.run.fits and entry.tokens_per_s is not None and not entry.leaves_out_host_memory
    ]
    known = [entry for entry in known if entry.bits == 16] or known
    best: PlacedKv | None = None
    for entry in known:
        if best is None or _rate(entry) > SAME_SPEED * _rate(best):
            best = entry
    return best


def _rate(entry: PlacedKv) -> float:
    return entry.tokens_per_s or 0.0


def why(placed: list[PlacedKv], fastest: PlacedKv | None) -> str:
    """Say in a sentence or two what decides."""
    unknown = next((entry for entry in placed if entry.leaves_out_host_memory), None)
    if fastest is None:
        if not any(entry.run.fits for entry in placed):
            return "no placement of the KV cache makes the run fit"
        if unknown is not None and unknown.run.fits:
            return f"only {unknown.override} fits; host memory's rate is unknown"
        return "no rate of this hardware is known"
    binding = binding_words(fastest.run.prediction.binding_resource)
    said = f"{fastest.override}: a step of {format_seconds(fastest.decode_step_s)}"
    said += f" is bound by {binding}"
    others = [entry for entry in placed if entry.bits == fastest.bits and entry is not fastest]
    others = [entry for entry in others if not entry.leaves_out_host_memory]
    compared = [_beside(entry, fastest) for entry in others]
    if compared:
        said += f" ({'; '.join(compared)})"
    if unknown is not None and unknown is not fastest:
        said += _break_even(unknown, fastest)
    return said


def _beside(entry: PlacedKv, fastest: PlacedKv) -> str:
    """Say how another placement compares with the fastest."""
    if not entry.run.fits:
        return f"{entry.override} does not fit"
    if entry.tokens_per_s is None:
        return f"the speed of {entry.override} is unknown"
    if _rate(fastest) <= SAME_SPEED * _rate(entry):
        return f"{entry.override} is as fast"
    binding = binding_words(entry.run.prediction.binding_resource)
    return f"{entry.override} {format_seconds(entry.decode_step_s)}, {binding}"


def _break_even(unknown: PlacedKv, fastest: PlacedKv) -> str:
    """Say from which rate of host memory on attention there would be faster."""
    step = unknown.run.prediction.ceiling.decode_step
    if not unknown.run.fits:
        return f". {unknown.override} does not fit"
    if not fastest.decode_step_s or (step.ceiling_s or 0.0) * SAME_SPEED >= fastest.decode_step_s:
        return f". {unknown.override} is no faster, whatever host memory reads"
    needed = step.demand.host_memory_bytes / fastest.decode_step_s
    return (
        f". Host memory's rate is unknown: {unknown.override} is faster from "
        f"{needed / 1e9:.3g} GB/s on (hardware.host_memory_bytes_per_s)"
    )
