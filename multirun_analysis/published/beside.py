"""Each published row beside what was measured, or planned, of the same thing."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal

from multirun_analysis.configuration import Configuration
from multirun_analysis.published.boxes import box_of
from multirun_analysis.published.rows import DECODE_ONLY, SPEED_METRICS, Published, read_published
from multirun_analysis.spread import Spread, scaled

PLANNED = "planned"
"""Said of a row that was planned and not run."""


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published row, and what was measured and planned of the same thing."""

    published: Published
    measured: Configuration | None
    rate: Spread | None
    """In the published row's own terms: see Published.rate_metric; of one GPU where the row is."""
    differs: str
    """What is not the same about it; empty for the very same configuration."""
    missing: str | None
    """Why nothing was measured."""
    planned: Configuration | None = None
    """A plan of the very same configuration for the published box, or the measured run's own."""

    @property
    def measured_bytes_per_s(self) -> float | None:
        """Return weight bytes x tokens/s / batch, as Published.implied_bytes_per_s does."""
        if self.measured is None or self.rate is None or not self.measured.streams:
            return None
        size, batch = self.measured.value("weight_stored_bytes"), self.measured.batch_size
        if size is None or not batch:
            return None
        per_device = _ranks(self.measured) if self.published.metric == DECODE_ONLY else 1
        return size * self.rate.median / (batch / per_device)


def planned_rate(item: Comparison, kind: Literal["ceiling", "predicted"]) -> float | None:
    """Return the tokens/s that the plan allows or predicts, in the published row's own terms."""
    planned, row = item.planned, item.published
    if planned is None:
        return None
    if row.metric != DECODE_ONLY:
        return planned.value(f"{kind}_generated_tokens_per_s")
    step_s, batch = planned.value(f"{kind}_decode_step_s"), planned.batch_size
    return None if not step_s or not batch else batch / step_s / _ranks(planned)


def _ranks(item: Configuration) -> int:
    return item.number("launcher.ranks") or 1


def relevant(found: Sequence[Configuration]) -> tuple[Published, ...]:
    """Return the published speeds of the models that were run or planned here.

    Tables that a preset names in its tags (published.source, published.table) are there whole.
    """
    models = {item.model for item in found}
    tables = {(item.tag("published.source"), item.tag("published.table")) for item in found} - {
        (None, None)
    }
    return tuple(
        row
        for row in read_published()
        if row.metric in SPEED_METRICS and (row.model in models or _named(row, tables))
    )


def _named(row: Published, tables: Iterable[tuple[str | None, str | None]]) -> bool:
    return any(
        row.source == source and (table is None or row.table == table) for source, table in tables
    )


def compare_published(found: Sequence[Configuration]) -> tuple[Comparison, ...]:
    """Put beside each relevant row the measured configuration that comes closest, or why not."""
    return tuple(_compare(row, found) for row in relevant(found))


def planned_equal(row: Published, found: Iterable[Configuration]) -> Configuration | None:
    """Find a plan of this very row for its own box: same model, bits, places, batch and lengths."""
    box = box_of(row.hardware)
    for item in found:
        same_box = box is not None and item.choices.get("hardware.name") == box.name
        if (
            same_box
            and item.planned
            and _same_thing(item, row)
            and _row_batch(item, row) == row.batch_size
            and item.workload == (row.prompt_tokens, row.new_tokens)
        ):
            return item
    return None


def _same_thing(item: Configuration, row: Published) -> bool:
    return (
        item.model == row.model
        and item.weights_bits == row.weights_bits
        and item.offload == row.offload
        and item.choices.get("kv_cache.placement", "device") == row.kv_placement
    )


def _compare(row: Published, found: Sequence[Configuration]) -> Comparison:
    same = [item for item in found if not item.planned and _same_thing(item, row)]
    planned = planned_equal(row, found)
    measured = [item for item in same if item.measured]
    if not measured:
        missing = row.why_not_comparable or _attempt(same) or (PLANNED if planned else None)
        return Comparison(
            published=row,
            measured=None,
            rate=None,
            differs="",
            missing=missing or "not run here",
            planned=planned,
        )
    closest = min(measured, key=lambda item: _distance(item, row))
    rate = closest.spread(row.rate_metric)
    if rate is not None and row.metric == DECODE_ONLY:
        rate = scaled(rate, 1 / _ranks(closest))
    return Comparison(
        published=row,
        measured=closest,
        rate=rate,
        differs=", ".join(_differences(closest, row)),
        missing=None,
        planned=planned,
    )


def _attempt(same: Sequence[Configuration]) -> str | None:
    failed = [item for item in same if item.failed_runs]
    return f"tried here: {failed[-1].status}" if failed else None


def _distance(item: Configuration, row: Published) -> tuple[int, float]:
    """Sort by equal lengths first, then the nearest batch; among equals the faster."""
    lengths = (item.workload != (row.prompt_tokens, row.new_tokens)) + 0
    batch = abs(_row_batch(item, row) - (row.batch_size or 0))
    return lengths, batch - item.rate * 1e-9


def _row_batch(item: Configuration, row: Published) -> int:
    """Return the measured batch, counted as the published row counts."""
    return (item.batch_size or 0) // (_ranks(item) if row.metric == DECODE_ONLY else 1)


def _differences(item: Configuration, row: Published) -> list[str]:
    found = []
    if _row_batch(item, row) != row.batch_size:
        found.append(f"batch {_row_batch(item, row)} here")
    if item.workload != (row.prompt_tokens, row.new_tokens):
        found.append(f"{item.workload[0]} + {item.workload[1]} tokens here")
    if _ranks(item) != row.devices:
        found.append(f"{_ranks(item)} of {row.devices} devices here")
    return found
