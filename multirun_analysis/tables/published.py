"""The table beside published results, both sides normalised by what their own hardware streams."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from multirun_analysis.published.beside import PLANNED, Comparison, planned_rate
from multirun_analysis.published.boxes import ceiling_bytes_per_s, explanation
from multirun_analysis.published.rows import Published
from multirun_analysis.table import (
    Cell,
    Column,
    Table,
    number_cell,
    spread_cells,
    text_cell,
    whole_cell,
)

COLUMNS = (
    Column(key="model", head="model"),
    Column(key="weights_bits", head="bits", number=True),
    Column(key="weights_on", head="weights on"),
    Column(key="kv_on", optional=True, head="KV on"),
    Column(key="batch_size", head="batch", number=True),
    Column(key="lengths", optional=True, head="tokens", help="Prompt + new"),
    Column(key="published", head="published", number=True),
    Column(key="published_unit", optional=True, head="unit"),
    Column(
        key="published_bytes_per_s",
        head="GB/s",
        number=True,
        optional=True,
        help="What the published number implies that its box streamed",
    ),
    Column(
        key="published_ceiling_fraction",
        head="%",
        number=True,
        help="Of the ceiling: what its box can stream from there",
    ),
    Column(
        key="planned_ceiling_per_s",
        head="at most",
        number=True,
        help="Ceiling of this configuration on that box, as zinfer plans it",
    ),
    Column(
        key="planned_per_s",
        head="predicted",
        number=True,
        help="Planned for that box; needs a calibration of it",
    ),
    Column(key="measured", head="here", number=True, help="Measured here"),
    Column(key="measured_stddev", head="", number=True, csv_only=True),
    Column(key="measured_bytes_per_s", head="GB/s here", number=True, optional=True),
    Column(
        key="measured_ceiling_fraction",
        head="% here",
        number=True,
        optional=True,
        help="Of the ceiling",
    ),
    Column(key="measured_hardware", head="here on", screen_only=True),
    Column(
        key="standing",
        head="standing",
        help="as published; approximate: read off a chart; draft: replaced later; inconsistent: no "
        "target",
        screen_only=True,
    ),
    Column(key="remark", head="remark", screen_only=True),
    Column(key="framework", head="framework", screen_only=True),
    Column(key="published_hardware", head="published on", screen_only=True),
    Column(key="source", head="source", screen_only=True),
    Column(key="table", head="", csv_only=True),
    Column(key="where", head="", csv_only=True),
)
OPTIONAL = (
    "planned_ceiling_per_s",
    "planned_per_s",
    "measured",
    "measured_bytes_per_s",
    "measured_ceiling_fraction",
    "measured_hardware",
)
"""Columns that are left out of the page where no row fills them."""
NOTE = (
    "Hardware differs, so compare the shares of the ceiling, not tokens/s. GB/s: bytes of the "
    "weights times tokens/s over the batch, which is what one pass over the weights streams in its "
    "time. %: of what the slowest part of their path can stream."
)


def published_table(comparisons: Sequence[Comparison]) -> Table:
    """Build one row for each published row, with what was measured and planned of it."""
    rows = tuple(_row(item) for item in sorted(comparisons, key=_least_to_compare))
    columns = tuple(
        replace(column, csv_only=True)
        if column.key in OPTIONAL and all(row[index].value is None for row in rows)
        else column
        for index, column in enumerate(COLUMNS)
    )
    return Table(
        name="published", title="Beside published results", note=NOTE, columns=columns, rows=rows
    )


def _least_to_compare(item: Comparison) -> tuple[bool, bool]:
    """Sort what stands beside a measured or planned number before what stands alone."""
    return item.measured is None, item.planned is None


def _row(item: Comparison) -> tuple[Cell, ...]:
    row, measured = item.published, item.measured
    implied, limit = row.implied_bytes_per_s, ceiling_bytes_per_s(row)
    share = None if implied is None or limit is None else implied / limit
    missing = None if item.missing == PLANNED else item.missing
    remark = "; ".join(filter(None, (missing, item.differs, explanation(row)))) or None
    return (
        text_cell(row.model or None),
        whole_cell(row.weights_bits),
        text_cell(row.weights_location or None),
        text_cell(row.kv_location or None),
        whole_cell(row.batch_size),
        text_cell(_lengths(row)),
        Cell(text=row.text, value=row.value if row.value is not None else row.text),
        text_cell(row.unit),
        number_cell(implied, 1e9),
        number_cell(share, 0.01, 2),
        number_cell(planned_rate(item, "ceiling")),
        number_cell(planned_rate(item, "predicted")),
        spread_cells(item.rate)[0],
        Cell(text="", value=item.rate.stddev if item.rate else None),
        number_cell(item.measured_bytes_per_s, 1e9),
        number_cell(measured.value("ceiling_fraction") if measured else None, 0.01, 2),
        text_cell(measured.context.device if measured else None),
        text_cell(row.standing, kind=row.standing.replace(" ", "-")),
        text_cell(remark),
        text_cell(row.framework),
        text_cell(row.hardware or None),
        text_cell(row.source),
        text_cell(row.table),
        text_cell(row.where),
    )


def _lengths(row: Published) -> str | None:
    if row.prompt_tokens is None or row.new_tokens is None:
        return None
    return f"{row.prompt_tokens} + {row.new_tokens}"
