"""Tables of a job's end: bytes planned beside measured, and the medians of its timings."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from zinfer.job.outcome import Outcome
from zinfer.redact import redact
from zinfer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Column, Table

WORDS_WIDTH, LEAST_WIDTH = 24, 8
PADDING = 3
"""Characters between two columns."""


def new_table(title: str, *columns: str, left: Collection[int] = (0,)) -> Table:
    """Return an empty table; columns whose index is in `left` hold words, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        words = index in left
        table.add_column(
            column, justify="left" if words else "right", overflow="fold", no_wrap=not words
        )
    return table


def hide_secrets(table: Table) -> None:
    """Take secrets out of a table's title, heads and cells."""
    table.title = redact(table.title)
    for column in table.columns:
        column.header = redact(column.header)
        column._cells = redact(column._cells)


def fit(table: Table, spare: Sequence[str], console: Console) -> None:
    """Make a table fit the console: leave columns out in the order of `spare`, then fold words.

    Columns of numbers are never cut. Words are folded to WORDS_WIDTH characters before a column
    goes, and to less only where none is spare.
    """
    from rich.measure import Measurement

    def natural(column: Column) -> int:
        cells = (column.header, *column.cells)
        widest = (Measurement.get(console, console.options, cell).maximum for cell in cells)
        return max(widest, default=0) + PADDING

    def least(column: Column) -> int:
        return natural(column) if column.no_wrap else min(natural(column), WORDS_WIDTH + PADDING)

    for head in spare:
        if sum(map(least, table.columns)) <= console.width:
            break
        table.columns = [column for column in table.columns if column.header != head]
    over = sum(map(natural, table.columns)) - console.width
    if over > 0:
        widest = max((column for column in table.columns if not column.no_wrap), key=natural)
        widest.width = max(LEAST_WIDTH, natural(widest) - PADDING - over)


def plan_table(outcome: Outcome) -> Table:
    """Return the table of bytes per tier, planned beside measured."""
    assert outcome.plan is not None
    model, metrics = outcome.model or {}, outcome.metrics
    billions = (model.get("parameters") or 0) / 1e9
    title = f"{model.get('name')}: {billions:.3g} B parameters, {model.get('dtype')}"
    table = new_table(title, "memory", "planned", "available", "measured", "made of", left=(0, 4))
    measured: dict[str, float | None] = {
        "device": metrics.get("peak_device_reserved_bytes"),
        "host": metrics.get("peak_host_rss_bytes"),
        "pinned": metrics.get("mlocked_bytes"),
        "disk": None,
    }
    for name, tier in outcome.plan["tiers"].items():
        if not tier["items"] and not tier["needed_bytes"]:
            continue
        parts = [outcome.plan["tiers"][part] for part in (name, *tier.get("includes", ()))]
        items = [item for part in parts for item in part["items"]]
        largest = sorted(items, key=lambda item: -item["bytes"])[:3]
        made_of = ", ".join(f"{item['name']} {format_bytes(item['bytes'])}" for item in largest)
        over = "" if tier["fits"] else " (too little)"
        row = (
            format_bytes(tier["needed_bytes"]),
            format_bytes(tier["available_bytes"]) + over,
            format_bytes(measured[name]),
            made_of,
        )
        table.add_row(name, *row)
    kv_measured = format_bytes(metrics.get("kv_cache_bytes"))
    table.add_row(
        "KV cache",
        format_bytes(model.get("kv_cache_bytes")),
        "",
        kv_measured,
        f"{model.get('kv_cache_bytes_per_token')} bytes a token",
    )
    table.add_row(
        "weights",
        format_bytes(outcome.plan.get("weight_stored_bytes", model.get("weight_bytes"))),
        "",
        format_bytes(metrics.get("weight_stored_bytes")),
        "",
    )
    return table


def result_table(outcome: Outcome) -> Table:
    """Return the table of medians of the timed generations with their spread."""
    metrics: dict[str, Any] = dict(outcome.metrics)
    table = new_table(
        f"median of {metrics['timed_runs']:g} timed generations",
        "metric",
        "median",
        "min",
        "max",
        "standard deviation",
    )
    for name, shown in (
        ("prefill_s", format_seconds),
        ("decode_step_s", format_seconds),
        ("total_s", format_seconds),
    ):
        table.add_row(
            name,
            *(
                shown(metrics.get(key))
                for key in (name, f"{name}_min", f"{name}_max", f"{name}_stddev")
            ),
        )
    rate = "generated_tokens_per_s"
    table.add_row(
        rate,
        *(
            _number(metrics.get(key))
            for key in (rate, f"{rate}_min", f"{rate}_max", f"{rate}_stddev")
        ),
    )
    for name in ("decode_tokens_per_s", "prefill_tokens_per_s"):
        table.add_row(name, _number(metrics.get(name)), "", "", "")
    for name in ("load_s", "first_generate_s"):
        table.add_row(name, format_seconds(metrics.get(name)), "", "", "")
    return table


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.4g}"
