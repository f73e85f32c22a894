"""The table of all configurations: what was chosen, what came out, whatever became of it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from multirun_analysis.best import implied_bytes_per_s
from multirun_analysis.compare import constants, differing_choices
from multirun_analysis.configuration import RATE, Configuration
from multirun_analysis.runs import STATUS_WORDS
from multirun_analysis.table import (
    Cell,
    Column,
    Table,
    number_cell,
    spread_cells,
    spread_columns,
    text_cell,
)
from multirun_analysis.tables.choices import (
    Measure,
    choice_cell,
    choice_columns,
    known,
    metric,
    same_everywhere,
)
from zinfer.units import GIB

RATE_HELP = "New tokens of all rows over prefill and decode time; median ± standard deviation"
MEASURES: tuple[Measure, ...] = (
    metric(
        "decode_step_s",
        "step ms",
        "Median time of one decode step of the whole batch",
        scale=1e-3,
        optional=True,
    ),
    metric(
        "time_to_first_token_s",
        "TTFT s",
        "Time to the first new token of every row: the prefill",
        optional=True,
    ),
    (
        Column(
            key="implied_bytes_per_s",
            head="GB/s",
            number=True,
            optional=True,
            help="Weight bytes over the time of a decode step, for weights off the device",
        ),
        lambda item: number_cell(implied_bytes_per_s(item), 1e9),
    ),
    metric(
        "ceiling_fraction",
        "% of ceiling",
        "Generated tokens/s over what the slowest resource allows",
        scale=0.01,
        digits=2,
        optional=True,
    ),
    metric("energy_j_per_token", "J/token", "Energy over new tokens", optional=True),
    (
        Column(key="binding_resource", head="bound by", screen_only=True),
        lambda item: text_cell(item.binding_resource),
    ),
    metric(
        "peak_device_reserved_bytes",
        "device GiB",
        "Most device memory that torch's allocator held",
        scale=GIB,
        screen_only=True,
    ),
    metric(
        "peak_host_rss_bytes",
        "host GiB",
        "Most host memory that the process held (VmHWM)",
        scale=GIB,
        screen_only=True,
    ),
    metric(
        "load_s",
        "load s",
        "From the start of building the model to an engine that can generate",
        screen_only=True,
    ),
)
CONTEXT_COLUMNS = (
    ("weights", "weights"),
    ("device", "machine"),
    ("commit_label", "commit"),
    ("method_version", "method"),
)
"""Field of Context and head of its column, shown where it differs."""


def runs_table(found: Sequence[Configuration]) -> Table:
    """Build one row for each configuration that was to be measured, failed ones included."""
    choices = tuple(choice for choice in differing_choices(found) if choice != "weights")
    same = constants(found, choices)
    differ = [
        (name, head)
        for name, head in CONTEXT_COLUMNS
        if len({getattr(item.context, name) for item in found}) > 1
    ]
    measures = known(MEASURES, found)
    failed = any(item.status != "ok" for item in found)
    unstable = any(item.stability not in (None, "stable") for item in found)
    verdict = Column(key="stability", head="stability", csv_only=not unstable)
    columns = (
        Column(key="status", head="status", screen_only=not failed),
        *choice_columns(choices),
        *(replace(column, csv_only=True) for column in choice_columns(tuple(same))),
        *spread_columns(RATE, "tokens/s", RATE_HELP),
        verdict,
        *(column for column, _ in measures),
        *(Column(key=name, head=head) for name, head in differ),
        Column(
            key="run_ids",
            head="runs",
            screen_only=True,
            help="Newest run in MLflow, and how many there are",
        ),
        Column(key="reason", head="reason", csv_only=True),
    )
    rows = tuple(
        (
            text_cell(STATUS_WORDS.get(item.status, item.status), kind=item.status),
            *(choice_cell(item, choice) for choice in (*choices, *same)),
            *spread_cells(item.rate_spread),
            text_cell(item.stability, kind=item.stability),
            *(cell(item) for _, cell in measures),
            *(text_cell(getattr(item.context, name)) for name, _ in differ),
            runs_cell(item),
            text_cell(item.reason),
        )
        for item in found
    )
    note = f"One row for each configuration, reruns merged.{same_everywhere(same)}"
    return Table(name="runs", title="All configurations", note=note, columns=columns, rows=rows)


def runs_cell(item: Configuration) -> Cell:
    """Link to the newest run, and say how many there are, failed and reused ones apart."""
    parts = [str(len(item.runs))] if len(item.runs) > 1 else []
    if item.failed_runs and item.ok_runs:
        parts.append(f"{len(item.failed_runs)} failed")
    if any(run.reused for run in item.runs):
        parts.append("reused")
    return Cell(
        text=item.newest.run_id[:8] + (f" ({', '.join(parts)})" if parts else ""),
        value=" ".join(run.run_id for run in item.runs),
        url=item.newest.url,
    )
