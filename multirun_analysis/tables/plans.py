"""The table of plans: what task=plan said, where nothing was to be measured."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.compare import constants, differing_choices
from multirun_analysis.configuration import Configuration
from multirun_analysis.runs import STATUS_WORDS
from multirun_analysis.table import Column, Table, text_cell, whole_cell
from multirun_analysis.tables.choices import (
    Measure,
    choice_cell,
    choice_columns,
    known,
    metric,
    same_everywhere,
)
from zinfer.units import GIB

MEASURES: tuple[Measure, ...] = (
    metric(
        "predicted_generated_tokens_per_s",
        "predicted tokens/s",
        "Needs a calibration of the machine",
    ),
    metric(
        "ceiling_generated_tokens_per_s",
        "at most tokens/s",
        "What the slowest resource allows",
    ),
    metric(
        "ceiling_decode_step_s",
        "step, at least ms",
        "The slowest resource's time",
        scale=1e-3,
        optional=True,
    ),
    metric(
        "ceiling_prefill_s", "prefill, at least s", "The slowest resource's time", optional=True
    ),
    (
        Column(key="binding_resource", head="bound by", optional=True),
        lambda item: text_cell(item.binding_resource),
    ),
    *(
        metric(f"plan_{tier}_needed_bytes", f"{tier} GiB", "Needed", scale=GIB, optional=True)
        for tier in ("device", "host", "pinned", "disk")
    ),
    (
        Column(key="largest_batch_size", head="largest batch", number=True, help="That fits"),
        lambda item: whole_cell(_whole(item.value("largest_batch_size"))),
    ),
)


def _whole(value: float | None) -> int | None:
    return None if value is None else int(value)


def fits(item: Configuration) -> str:
    """Answer 'yes', 'no', or what became of the plan."""
    known_fit = item.value("plan_fits")
    if item.status == "planned" and known_fit is not None:
        return "yes" if known_fit else "no"
    return "no" if item.status == "does_not_fit" else STATUS_WORDS.get(item.status, item.status)


def plans_table(found: Sequence[Configuration]) -> Table:
    """Build one row for each configuration that was only planned."""
    planned = [item for item in found if item.planned]
    choices = tuple(choice for choice in differing_choices(planned) if choice != "weights")
    measures = [
        measure
        for measure in known(MEASURES, planned)
        if any(measure[1](item).value not in (None, 0.0) for item in planned)
    ]
    columns = (
        Column(key="fits", head="fits"),
        *choice_columns(choices),
        *(column for column, _ in measures),
        Column(key="reason", head="reason", csv_only=True),
    )
    rows = tuple(
        (
            text_cell(fits(item)),
            *(choice_cell(item, choice) for choice in choices),
            *(cell(item) for _, cell in measures),
            text_cell(item.newest.reason),
        )
        for item in planned
    )
    machines = ", ".join(sorted({item.context.device for item in planned}))
    note = f"Planned for {machines}; nothing was measured."
    return Table(
        name="plans",
        title="Plans",
        note=note + same_everywhere(constants(planned, choices)),
        columns=columns,
        rows=rows,
    )
