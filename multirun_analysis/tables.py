"""Comparisons -> tables."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from multirun_analysis.best import Best, implied_bytes_per_s
from multirun_analysis.compare import LABELS, RATE, Configuration, constants, shown_choices
from multirun_analysis.published import Comparison, ceiling_bytes_per_s, explanation
from multirun_analysis.ratios import Baseline, Ratio
from multirun_analysis.read import Json, Run
from multirun_analysis.spread import Spread, format_number, format_spread
from multirun_analysis.table import (
    Cell,
    Column,
    Table,
    number_cell,
    spread_cells,
    spread_columns,
    text_cell,
    whole_cell,
)
from zinfer.units import GIB

STATUS_WORDS = {
    "ok": "measured",
    "planned": "planned only",
    "refused": "refused",
    "does_not_fit": "does not fit",
    "oom_device": "out of device memory",
    "oom_host": "out of host memory",
    "killed": "killed",
    "timeout": "timed out",
    "error": "failed",
    "running": "not ended",
}


# Choices and measures


def choice_cell(item: Configuration, choice: str) -> Cell:
    """A choice as it sorts: numbers as numbers."""
    value, number = item.chosen(choice), item.number(choice)
    return Cell(text=value, value=number if number is not None else None if value == "-" else value)


def choice_columns(choices: Sequence[str]) -> tuple[Column, ...]:
    numbers = {"batch.batch_size", "batch.prompt_tokens", "batch.new_tokens", "launcher.ranks"}
    return tuple(
        Column(key=choice, head=LABELS.get(choice, choice), number=choice in numbers)
        for choice in choices
    )


Measure = tuple[Column, Callable[[Configuration], Cell]]


def _metric(key: str, head: str, scale: float, help_: str, digits: int = 3) -> Measure:
    return Column(key=key, head=head, number=True, help=help_), lambda item: number_cell(
        item.value(key), scale, digits
    )


RUN_MEASURES: tuple[Measure, ...] = (
    _metric("decode_step_s", "step ms", 1e-3, "Median time of one decode step of the whole batch"),
    _metric(
        "time_to_first_token_s",
        "TTFT s",
        1,
        "Time to the first new token of every row: the prefill",
    ),
    (
        Column(
            key="implied_bytes_per_s",
            head="GB/s",
            number=True,
            help="Weight bytes over the time of a decode step, for weights off the device",
        ),
        lambda item: number_cell(implied_bytes_per_s(item), 1e9),
    ),
    _metric(
        "ceiling_fraction",
        "% of ceiling",
        0.01,
        "Generated tokens/s over what the slowest resource allows",
        2,
    ),
    (
        Column(key="binding_resource", head="bound by"),
        lambda item: text_cell(item.binding_resource),
    ),
    _metric(
        "peak_device_reserved_bytes",
        "device GiB",
        GIB,
        "Most device memory that torch's allocator held",
    ),
    _metric(
        "peak_host_rss_bytes", "host GiB", GIB, "Most host memory that the process held (VmHWM)"
    ),
    _metric(
        "load_s", "load s", 1, "From the start of building the model to an engine that can generate"
    ),
)
CONTEXT_COLUMNS = (("weights", "weights"), ("device", "machine"), ("method_version", "method"))


def runs_table(found: Sequence[Configuration]) -> Table:
    """Every configuration, whatever became of it."""
    choices = tuple(choice for choice in shown_choices(found) if choice != "weights")
    same = constants(found)
    contexts = [
        (name, head)
        for name, head in CONTEXT_COLUMNS
        if len({getattr(item.context, name) for item in found}) > 1
    ]
    measures = [
        measure
        for measure in RUN_MEASURES
        if any(measure[1](item).value is not None for item in found)
    ]
    columns = (
        Column(key="status", head="status"),
        *choice_columns(choices),
        *(replace(column, csv_only=True) for column in choice_columns(tuple(same))),
        *spread_columns(
            RATE,
            "tokens/s",
            "New tokens of all rows over prefill and decode time; median ± standard deviation",
        ),
        *(column for column, _ in measures),
        *(Column(key=name, head=head) for name, head in contexts),
        Column(key="commit", head="commit", help="Of zinfer; * for a changed working tree"),
        Column(key="run_ids", head="runs", help="Newest run in MLflow, and how many there are"),
        Column(key="reason", head="reason", csv_only=True),
    )
    rows = tuple(
        (
            text_cell(STATUS_WORDS.get(item.status, item.status), kind=item.status),
            *(choice_cell(item, choice) for choice in (*choices, *same)),
            *spread_cells(item.rate_spread),
            *(cell(item) for _, cell in measures),
            *(text_cell(getattr(item.context, name)) for name, _ in contexts),
            text_cell(item.context.commit_label),
            _runs_cell(item),
            text_cell(item.reason),
        )
        for item in found
    )
    return Table(
        name="runs",
        title="All configurations",
        note=f"One row for each configuration, reruns merged.{_same_everywhere(same)}",
        columns=columns,
        rows=rows,
    )


def _same_everywhere(same: Mapping[str, str]) -> str:
    if not same:
        return ""
    return f" The same everywhere: {', '.join(f'{LABELS[name]} {value}' for name, value in same.items())}."


def _runs_cell(item: Configuration) -> Cell:
    failed = f", {len(item.failed_runs)} failed" if item.failed_runs and item.ok_runs else ""
    count = f" ({len(item.runs)}{failed})" if len(item.runs) > 1 else ""
    return Cell(
        text=item.newest.run_id[:8] + count,
        value=" ".join(run.run_id for run in item.runs),
        url=item.newest.url,
    )


def best_table(best: Sequence[Best]) -> Table:
    """The first thing that a reader wants."""
    columns = (
        Column(key="model", head="model"),
        Column(key="configuration", head="fastest with"),
        *spread_columns(RATE, "tokens/s", "Median ± standard deviation"),
        Column(key="why", head="why"),
        Column(key="limit", head="what limits it"),
        Column(key="lowest_latency", head="shortest step"),
        Column(key="weights", head="weights"),
        Column(key="machine", head="machine"),
        Column(key="commit", head="commit"),
    )
    rows = tuple(
        (
            text_cell(item.configuration.model),
            text_cell(item.label),
            *spread_cells(item.rate),
            text_cell(item.reason),
            text_cell(item.limit),
            text_cell(item.low_latency or "the same"),
            text_cell(item.configuration.context.weights),
            text_cell(item.configuration.context.device),
            text_cell(item.configuration.context.commit_label),
        )
        for item in best
    )
    return Table(
        name="best",
        title="Best configuration per model",
        note="Ranked by generated tokens/s.",
        columns=columns,
        rows=rows,
    )


def failures_table(found: Sequence[Configuration]) -> Table:
    """Every run that did not end well, with its reason; the same end of the same configuration in one row."""
    choices = shown_choices(found)
    ends: dict[tuple[int, str, str], list[Run]] = {}
    for number, item in enumerate(found):
        for run in item.failed_runs:
            ends.setdefault((number, run.status, run.reason or "no reason was logged"), []).append(
                run
            )
    columns = (
        Column(key="status", head="what happened"),
        *choice_columns(choices),
        Column(key="reason", head="reason"),
        Column(key="times", head="times", number=True),
        Column(key="run_ids", head="newest run"),
    )
    rows = tuple(
        (
            text_cell(STATUS_WORDS.get(status, status), kind=status),
            *(choice_cell(found[number], choice) for choice in choices),
            text_cell(reason),
            whole_cell(len(runs)),
            Cell(
                text=_short_id(runs[-1]),
                value=" ".join(run.run_id for run in runs),
                url=runs[-1].url,
            ),
        )
        for (number, status, reason), runs in ends.items()
    )
    note = "Runs that did not end well stay in every count."
    return Table(
        name="failures", title="What failed, and why", note=note, columns=columns, rows=rows
    )


def _short_id(run: Run) -> str:
    return run.run_id[:8] if run.url else run.name


def speedup_table(ratios: Sequence[Ratio], baseline: Baseline) -> Table:
    """A matrix: one row for each configuration without the baseline's choice, one column for each of its values."""
    others = [
        choice
        for choice in shown_choices([item.candidate for item in ratios])
        if choice != baseline.name
    ]
    values = sorted(
        {item.candidate.chosen(baseline.name) for item in ratios},
        key=lambda value: (value != baseline.value, _sortable(value)),
    )
    rows: dict[tuple[object, ...], dict[str, Ratio]] = {}
    for item in ratios:
        key = (
            item.candidate.context,
            *(choice_cell(item.candidate, choice).value for choice in others),
        )
        kept = rows.setdefault(key, {})
        value = item.candidate.chosen(baseline.name)
        if value not in kept or _median(item.ratio) > _median(kept[value].ratio):
            kept[value] = item
    columns = (
        *choice_columns(others),
        *(
            column
            for value in values
            for column in (
                Column(
                    key=f"{baseline.name}={value}",
                    head=f"{LABELS.get(baseline.name, baseline.name)} {value}",
                    number=True,
                ),
                Column(key=f"{baseline.name}={value}_stddev", head="", number=True, csv_only=True),
            )
        ),
    )
    filled = []
    for kept in rows.values():
        any_item = next(iter(kept.values())).candidate
        cells = [choice_cell(any_item, choice) for choice in others]
        for value in values:
            cells += _ratio_cells(kept.get(value))
        filled.append(tuple(cells))
    return Table(
        name="speedup",
        title=f"Speed-up over {baseline}",
        note="Ratio of generated tokens/s ± first-order error, all else equal; a dash has no baseline that was measured.",
        columns=columns,
        rows=tuple(filled),
    )


def _ratio_cells(item: Ratio | None) -> tuple[Cell, Cell]:
    if item is None or item.ratio is None:
        return Cell(text="-" if item is None else f"- ({item.missing})"), Cell(text="")
    return Cell(text=format_spread(item.ratio), value=item.ratio.median), Cell(
        text="", value=item.ratio.stddev
    )


def _sortable(value: str) -> tuple[float, str]:
    return (float(value) if value.isdecimal() else float("inf"), value)


def _median(spread: Spread | None) -> float:
    return spread.median if spread else -1.0


def memory_table(found: Sequence[Configuration]) -> Table:
    """Planned beside measured, for every configuration that has both."""
    pairs = (
        ("device", "plan_device_needed_bytes", "peak_device_reserved_bytes"),
        ("host", "plan_host_needed_bytes", "peak_host_rss_bytes"),
        ("pinned", "plan_pinned_needed_bytes", "mlocked_bytes"),
    )
    measured = [
        item
        for item in found
        if item.ok_runs and any(item.value(plan) is not None for _, plan, _ in pairs)
    ]
    choices = shown_choices(found)
    columns = (
        *choice_columns(choices),
        *(
            column
            for tier, plan, peak in pairs
            for column in (
                Column(key=plan, head=f"{tier} planned GiB", number=True),
                Column(key=peak, head=f"{tier} measured GiB", number=True),
            )
        ),
        Column(key="plan_disk_needed_bytes", head="disk planned GiB", number=True),
    )
    rows = tuple(
        (
            *(choice_cell(item, choice) for choice in choices),
            *(
                number_cell(item.value(name), GIB)
                for _, plan, peak in pairs
                for name in (plan, peak)
            ),
            number_cell(item.value("plan_disk_needed_bytes"), GIB),
        )
        for item in measured
    )
    note = "Planned before anything was allocated; measured at its highest. On a machine without a GPU the device is host memory."
    return Table(
        name="memory",
        title="Memory per tier, planned and measured",
        note=note,
        columns=columns,
        rows=rows,
    )


def published_comparison_table(comparisons: Sequence[Comparison]) -> Table:
    """Published rows, and what was measured of the same thing, both normalised by what their own hardware streams."""
    columns = (
        Column(key="model", head="model"),
        Column(key="weights_bits", head="bits", number=True),
        Column(key="weights_on", head="weights on"),
        Column(key="kv_on", head="KV on"),
        Column(key="batch_size", head="batch", number=True),
        Column(key="lengths", head="tokens", help="Prompt + new"),
        Column(key="published", head="published", number=True),
        Column(key="published_unit", head="unit"),
        Column(
            key="published_bytes_per_s",
            head="GB/s",
            number=True,
            help="What the published number implies that its box streamed",
        ),
        Column(
            key="published_ceiling_fraction",
            head="% of ceiling",
            number=True,
            help="Of what its box can stream from there",
        ),
        Column(key="measured", head="measured here", number=True),
        Column(key="measured_stddev", head="", number=True, csv_only=True),
        Column(key="measured_bytes_per_s", head="GB/s here", number=True),
        Column(key="measured_ceiling_fraction", head="% of ceiling here", number=True),
        Column(key="measured_hardware", head="here on"),
        Column(
            key="standing",
            head="standing",
            help="as published; approximate: read off a chart; draft: replaced later; inconsistent: no target",
        ),
        Column(key="remark", head="remark"),
        Column(key="framework", head="framework"),
        Column(key="published_hardware", head="published on"),
        Column(key="source", head="source"),
        Column(key="table", head="", csv_only=True),
        Column(key="where", head="", csv_only=True),
    )
    note = (
        "Hardware differs, so compare the shares of the ceiling, not tokens/s. Implied: bytes of the weights times tokens/s over the "
        "batch, which is what one pass over the weights streams in its time. Ceiling: the slowest part of their path."
    )
    return Table(
        name="published",
        title="Beside published results",
        note=note,
        columns=columns,
        rows=tuple(_published_row(item) for item in comparisons),
    )


def _published_row(item: Comparison) -> tuple[Cell, ...]:
    row, measured = item.published, item.measured
    implied, limit = row.implied_bytes_per_s, ceiling_bytes_per_s(row)
    lengths = (
        None
        if row.prompt_tokens is None or row.new_tokens is None
        else f"{row.prompt_tokens} + {row.new_tokens}"
    )
    return (
        text_cell(row.model or None),
        whole_cell(row.weights_bits),
        text_cell(row.weights_location or None),
        text_cell(row.kv_location or None),
        whole_cell(row.batch_size),
        text_cell(lengths),
        Cell(text=row.text, value=row.value if row.value is not None else row.text),
        text_cell(row.unit),
        number_cell(implied, 1e9),
        number_cell(None if implied is None or limit is None else implied / limit, 0.01, 2),
        Cell(text=item.missing, kind="missing") if item.missing else spread_cells(item.rate)[0],
        Cell(text="", value=item.rate.stddev if item.rate else None),
        number_cell(item.measured_bytes_per_s, 1e9),
        number_cell(measured.value("ceiling_fraction") if measured else None, 0.01, 2),
        text_cell(measured.context.device if measured else None),
        text_cell(row.standing, kind=row.standing.replace(" ", "-")),
        text_cell("; ".join(filter(None, (item.differs, explanation(row)))) or None),
        text_cell(row.framework),
        text_cell(row.hardware or None),
        text_cell(row.source),
        text_cell(row.table),
        text_cell(row.where),
    )


ENVIRONMENT_ROWS = (
    ("processor", ("cpu", "model")),
    ("usable cores", ("cpu", "usable_cores")),
    ("frequency governor", ("cpu", "governor")),
    ("operating system", ("os",)),
    ("kernel", ("kernel",)),
    ("Python", ("python",)),
    ("zinfer", ("zinfer", "version")),
    ("commit", ("zinfer", "commit")),
)
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "mlflow", "hydra-core")


def environment_table(environments: Sequence[tuple[str, Json]]) -> Table:
    """What the numbers depend on besides the configuration: one column for each machine and commit."""
    names = [(name, _lookup(path)) for name, path in ENVIRONMENT_ROWS]
    names += [(package, _lookup(("packages", package))) for package in PACKAGES]
    names.insert(0, ("GPUs", _gpus))
    names.insert(
        3, ("host memory GiB", lambda found: _gib(_lookup(("memory", "total_bytes"))(found)))
    )
    columns = (
        Column(key="what", head=""),
        *(Column(key=name, head=name) for name, _ in environments),
    )
    rows = [
        (text_cell(name), *(text_cell(look(found)) for _, found in environments))
        for name, look in names
    ]
    known = tuple(row for row in rows if any(cell.value is not None for cell in row[1:]))
    return Table(
        name="environment",
        title="Where this was measured",
        note="From environment.json of the newest run of each machine and commit.",
        columns=columns,
        rows=known,
    )


def _lookup(path: Sequence[str]) -> Callable[[Json], object]:
    def look(found: Json) -> object:
        value: object = found
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return value

    return look


def _gib(count: object) -> str | None:
    return format_number(count / GIB) if isinstance(count, int | float) else None


def _gpus(found: Json) -> str | None:
    """'NVIDIA H100 80GB HBM3 (80 GiB, driver 550.54, power limit 700 W)'."""
    gpus = found.get("gpus") or []
    lines = []
    for gpu in gpus:
        facts = [
            f"{_gib(gpu.get('total_bytes'))} GiB" if gpu.get("total_bytes") else None,
            f"driver {gpu['driver_version']}" if gpu.get("driver_version") else None,
            f"power limit {gpu['power_limit_watts']:g} W"
            if gpu.get("power_limit_watts")
            else "power limit not known",
        ]
        lines.append(f"{gpu.get('name')} ({', '.join(filter(None, facts))})")
    return "; ".join(lines) or None
