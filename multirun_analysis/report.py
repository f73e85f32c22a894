"""One folder: report.html (one file, no network), report.md, tables/ and figures/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any

import zinfer
from multirun_analysis import plots, tables
from multirun_analysis.best import Best, best_per_model
from multirun_analysis.canvas import Canvas, Figure
from multirun_analysis.compare import CIRCUMSTANCES, Configuration, configurations, mixtures
from multirun_analysis.published import compare_published
from multirun_analysis.ratios import Baseline, default_baseline, ratios
from multirun_analysis.read import Json, Selection
from multirun_analysis.table import Table, to_markdown, write_tables

MAX_ENVIRONMENTS = 3
"""Columns of the environment table: each needs one file of the store."""
MAX_MARKDOWN_ROWS = 200
NOT_CLAIMED = (
    "That these speeds hold on other hardware: the share of the ceiling is what carries over, not tokens/s.",
    "Anything about requests that arrive over time: one batch of equal lengths runs from start to end, nothing is queued or batched anew.",
    "Anything about the text: lengths are fixed, the end-of-sequence token is ignored, and dummy weights say nothing.",
    "That a difference within the spread is a difference: the spread is over repeats on one machine, not over machines or days.",
)


@dataclass(frozen=True, kw_only=True)
class Report:
    """Everything that the pages show."""

    title: str
    where: str
    written: str
    measured_between: str | None
    counts: tuple[tuple[str, str, int], ...]
    """(status, its words, runs)"""
    best: tuple[Best, ...]
    circumstances: tuple[str, ...]
    """Names of Context's fields that differ, so that each best must say its own."""
    notes: tuple[str, ...]
    runs: Table
    tables: tuple[Table, ...]
    """The others, in their order; empty ones are left out."""
    figures: tuple[Figure, ...]
    version: str = zinfer.__version__
    not_claimed: tuple[str, ...] = NOT_CLAIMED

    def table(self, name: str) -> Table | None:
        """One of `tables`."""
        return next((table for table in self.tables if table.name == name), None)


def write_report(selection: Selection, out: Path, baseline: Baseline | None = None) -> Report:
    """Compare, draw and write everything into `out`."""
    found = configurations(selection.runs)
    best = best_per_model(found)
    chosen = baseline or default_baseline(found)
    compared = ratios(found, chosen) if chosen else ()
    out.mkdir(parents=True, exist_ok=True)
    with Canvas(out / "figures") as canvas:
        figures = plots.draw(canvas, found, compared, chosen, selection.history)
    notes = [*selection.notes, *mixtures(found)]
    if baseline and not any(item.ratio for item in compared):
        notes.append(f"No speed-up over {baseline}: no run that was measured has it.")
    every = [
        tables.best_table(best),
        tables.failures_table(found),
        *([tables.speedup_table(compared, chosen)] if chosen else []),
        tables.published_comparison_table(compare_published(found)),
        tables.memory_table(found),
        tables.environment_table(environments(selection, found)),
    ]
    report = Report(
        title=selection.title,
        where=selection.where,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        measured_between=measured_between(selection),
        counts=status_counts(selection),
        best=best,
        circumstances=tuple(
            name
            for name in CIRCUMSTANCES
            if len({getattr(item.context, name) for item in found}) > 1
        ),
        notes=tuple(notes),
        runs=tables.runs_table(found),
        tables=tuple(table for table in every if table.rows),
        figures=figures,
    )
    write_tables([report.runs, *report.tables], out / "tables")
    (out / "report.html").write_text(render("report.html.j2", report))
    (out / "report.md").write_text(render("report.md.j2", report))
    return report


def environments(selection: Selection, found: Sequence[Configuration]) -> list[tuple[str, Json]]:
    """environment.json of the newest run of each machine and commit, the most used first."""
    groups: dict[tuple[str, str], list[Configuration]] = {}
    for item in found:
        groups.setdefault((item.context.device, item.context.commit_label), []).append(item)
    ordered = sorted(groups.items(), key=lambda entry: -len(entry[1]))[:MAX_ENVIRONMENTS]
    read = (
        (f"{device}, {commit}", selection.environment(group[-1].newest))
        for (device, commit), group in ordered
    )
    return [(name, environment) for name, environment in read if environment is not None]


def status_counts(selection: Selection) -> tuple[tuple[str, str, int], ...]:
    """How many runs came to what end, in a fixed order."""
    counted = Counter(run.status for run in selection.runs)
    return tuple(
        (status, words, counted[status])
        for status, words in tables.STATUS_WORDS.items()
        if counted[status]
    )


def measured_between(selection: Selection) -> str | None:
    """'2026-11-22 14:00 to 15:30 UTC'."""
    started = [run.started for run in selection.runs if run.started]
    if not started:
        return None
    first, last = min(started), max(started)
    same_day = "%H:%M UTC" if first.date() == last.date() else "%Y-%m-%d %H:%M UTC"
    return f"{first:%Y-%m-%d %H:%M} to {last.strftime(same_day)}"


def render(template: str, report: Report) -> str:
    """A page. HTML is escaped; the figures' SVG is ours."""
    return str(
        _templates().get_template(template).render(report=report, max_rows=MAX_MARKDOWN_ROWS)
    )


@cache
def _templates() -> Any:
    import jinja2

    loader = jinja2.FunctionLoader(
        lambda name: resources.files("multirun_analysis").joinpath("templates", name).read_text()
    )
    escape = jinja2.select_autoescape(enabled_extensions=("html.j2",), default=False)
    environment = jinja2.Environment(
        loader=loader,
        autoescape=escape,
        trim_blocks=True,
        lstrip_blocks=True,
        undefined=jinja2.StrictUndefined,
    )
    environment.filters["markdown_table"] = to_markdown
    return environment
