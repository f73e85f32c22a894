"""Show a job: a live line while it runs, a table at its end. With format=json, one document."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection
from typing import TYPE_CHECKING, Any, ClassVar, TextIO

from zinfer.job.events import Event
from zinfer.job.outcome import Outcome
from zinfer.redact import redact
from zinfer.units import format_bytes, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

REDRAW_S = 0.2
BAR_WIDTH = 24


class Terminal:
    """Writes the result to stdout and the rest to stderr; live only where that is a terminal."""

    _said: ClassVar[set[str]] = set()
    """Subjects of which every job of a sweep would say the same."""

    def __init__(
        self,
        output_format: str,
        *,
        name: str = "",
        out: TextIO | None = None,
        err: TextIO | None = None,
    ) -> None:
        self._json = output_format == "json"
        self._name = name
        self._out = out or sys.stdout
        self._err = err or sys.stderr
        self._live = self._err.isatty()
        self._line = ""
        self._phase = ""
        self._phase_started_s = time.monotonic()
        self._progress = ""
        self._drawn_s = 0.0

    @property
    def live(self) -> bool:
        """Return whether a live line is drawn, so that no other progress need be shown."""
        return self._live

    def event(self, event: Event) -> None:
        """Show what a worker reported."""
        match event["event"]:
            case "phase":
                self._phase, self._progress, self._phase_started_s = (
                    event["name"],
                    "",
                    time.monotonic(),
                )
            case "progress":
                self._progress = _bar(event["done"], event["total"], event["unit"])
            case "sample" if event["kind"] == "timed":
                self._progress = f"repeat {event['index'] + 1}: {format_seconds(event['total_s'])}"
            case "warning":
                self.warning(event["message"])
        self.tick(force=True)

    def tick(self, *, force: bool = False) -> None:
        """Redraw the live line."""
        now_s = time.monotonic()
        if not self._live or (not force and now_s - self._drawn_s < REDRAW_S):
            return
        self._drawn_s = now_s
        elapsed = format_seconds(now_s - self._phase_started_s)
        self._draw(
            f"{self._name}: {self._phase or 'starting'} {elapsed}  {self._progress}".rstrip()
        )

    def _draw(self, line: str) -> None:
        if self._live:
            self._err.write("\r\x1b[2K" + line)
            self._err.flush()
        self._line = line

    def note(self, message: str) -> None:
        """Print one line for people."""
        self._clear()
        print(redact(message), file=self._err, flush=True)

    def note_once(self, message: str, *, about: str) -> None:
        """Print one line for people, where this process has not said one about this yet."""
        if about not in self._said:
            self._said.add(about)
            self.note(message)

    def warning(self, message: str) -> None:
        """Print one line for people, marked as a warning."""
        self.note(f"warning: {message}")

    def _clear(self) -> None:
        if self._live and self._line:
            self._draw("")

    def finish(self, outcome: Outcome) -> None:
        """Show the end of a job: its table, or its document."""
        self._clear()
        if self._json:
            print(json.dumps(redact(outcome.document())), file=self._out, flush=True)
            return
        if outcome.status == "refused":
            for problem in outcome.problems:
                print(redact(f"refused: {problem}"), file=self._err, flush=True)
            return
        if outcome.plan is not None:
            self._print(plan_table(outcome))
        if "timed_runs" in outcome.metrics:
            from zinfer.plan.page import verdict_line

            self._print(result_table(outcome))
            if verdict := verdict_line(outcome):
                print(verdict, file=self._out)
        if outcome.status not in ("ok", "planned"):
            self.note(f"{outcome.status}: {outcome.reason}")
        if outcome.status == "planned":
            from zinfer.plan.page import page

            assert outcome.plan is not None
            print(*page(outcome), sep="\n", file=self._out)
            print("DeepSpeed JSON:", file=self._out)
            print(json.dumps(outcome.deepspeed, indent=2), file=self._out)
        if outcome.job_dir:
            self.note(
                f"job folder {outcome.job_dir}"
                + (f", MLflow run {outcome.run_id}" if outcome.run_id else "")
            )
        if outcome.run_page:
            self.note(f"to see it: {outcome.run_page}")

    def _print(self, table: Table, *, to_out: bool = True) -> None:
        from rich.console import Console

        file = self._out if to_out else self._err
        Console(file=file, width=None if file.isatty() else 140, highlight=False).print(table)

    def table(self, table: Table, *, to_out: bool = True) -> None:
        """Print a table of a sweep: the result on stdout, everything else on stderr."""
        self._clear()
        self._print(table, to_out=to_out and not self._json)


def _bar(done: float, total: float, unit: str) -> str:
    share = min(1.0, done / total) if total else 1.0
    filled = int(share * BAR_WIDTH)
    count = (
        f"{format_bytes(done)} of {format_bytes(total)}"
        if unit == "bytes"
        else f"{done:g} of {total:g} {unit}"
    )
    return f"[{'#' * filled}{'.' * (BAR_WIDTH - filled)}] {count}"


def new_table(title: str, *columns: str, left: Collection[int] = (0,)) -> Table:
    """Return an empty table; columns whose index is in `left` hold words, the others numbers."""
    from rich import box
    from rich.table import Table

    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for index, column in enumerate(columns):
        table.add_column(column, justify="left" if index in left else "right", overflow="fold")
    return table


def plan_table(outcome: Outcome) -> Table:
    """Return the table of bytes per tier, planned beside measured."""
    assert outcome.plan is not None
    model, metrics = outcome.model or {}, outcome.metrics
    billions = (model.get("parameters") or 0) / 1e9
    title = f"{model.get('name')}: {billions:.3g} B parameters, {model.get('dtype')}"
    table = new_table(title, "memory", "planned", "available", "measured", "made of")
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
        format_bytes(model.get("weight_bytes")),
        "",
        format_bytes(metrics.get("weight_bytes")),
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
