"""One folder: report.html (one file, no network), report.md, tables/, figures/ and data/."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import zinfer
from multirun_analysis.best import Best, best_per_model
from multirun_analysis.command import DRIVE_WRITES_TB
from multirun_analysis.compare import configurations
from multirun_analysis.configuration import CIRCUMSTANCES, Configuration
from multirun_analysis.figures import draw
from multirun_analysis.figures.canvas import Canvas, Figure
from multirun_analysis.formats import write_tables
from multirun_analysis.frame import write_exports
from multirun_analysis.notes import mixtures
from multirun_analysis.progress import Progress, silent
from multirun_analysis.published.beside import Comparison, compare_published
from multirun_analysis.ratios import Baseline, Ratio, default_baseline, ratios
from multirun_analysis.render import render
from multirun_analysis.runs import STATUS_WORDS, Json, Selection
from multirun_analysis.table import Table
from multirun_analysis.tables.environment import environment_table
from multirun_analysis.tables.memory import memory_table
from multirun_analysis.tables.outcomes import best_table, failures_table, warnings_table
from multirun_analysis.tables.plans import plans_table
from multirun_analysis.tables.published import published_table
from multirun_analysis.tables.runs import runs_table
from multirun_analysis.tables.speedup import speedup_table
from multirun_analysis.tables.traffic import traffic_table
from zinfer.units import counted

MAX_ENVIRONMENTS = 3
"""Columns of the environment table: each needs one file of the store."""
NOT_CLAIMED = (
    "That these speeds hold on other hardware: the share of the ceiling is what carries over, not "
    "tokens/s.",
    "Anything about requests that arrive over time: one batch of equal lengths runs from start to "
    "end, nothing is queued or batched anew.",
    "Anything about the text: lengths are fixed, the end-of-sequence token is ignored, and dummy "
    "weights say nothing.",
    "That a difference within the spread is a difference: the spread is over repeats on one "
    "machine, not over machines or days.",
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
    """Without rows where nothing was to be measured."""
    tables: tuple[Table, ...]
    """The others, in their order; empty ones are left out."""
    figures: tuple[Figure, ...]
    """Those that have a panel."""
    not_drawn: tuple[str, ...]
    """Why each other figure is not there."""
    version: str = zinfer.__version__
    not_claimed: tuple[str, ...] = NOT_CLAIMED

    def table(self, name: str) -> Table | None:
        """Return one of `tables`, or None."""
        return next((table for table in self.tables if table.name == name), None)


@dataclass(frozen=True, kw_only=True)
class Compared:
    """A selection after all comparisons, before anything is written."""

    selection: Selection
    found: tuple[Configuration, ...]
    best: tuple[Best, ...]
    baseline: Baseline | None
    ratios: tuple[Ratio, ...]
    published: tuple[Comparison, ...]


def compare(selection: Selection, baseline: Baseline | None = None) -> Compared:
    """Group the runs, and compare them among themselves and with what was published."""
    found = configurations(selection.runs)
    chosen = baseline or default_baseline(found)
    return Compared(
        selection=selection,
        found=found,
        best=best_per_model(found),
        baseline=chosen,
        ratios=ratios(found, chosen) if chosen else (),
        published=compare_published(found),
    )


def write_report(
    selection: Selection,
    out: Path,
    baseline: Baseline | None = None,
    progress: Progress = silent,
    *,
    drive_writes_tb: float = DRIVE_WRITES_TB,
) -> Report:
    """Compare, draw and write everything into `out`.

    Args:
        baseline: what speed-ups are over; None chooses it.
        progress: shows the step that runs.
        drive_writes_tb: terabytes of writes that a drive for swapping is rated for.
    """
    progress(f"comparing {counted(len(selection.runs), 'run')}")
    compared = compare(selection, baseline)
    out.mkdir(parents=True, exist_ok=True)
    with Canvas(out / "figures") as canvas:
        figures = draw(
            canvas,
            compared.found,
            compared.ratios,
            compared.baseline,
            compared.published,
            selection.history,
            progress,
        )
    notes = [*selection.notes, *mixtures(compared.found)]
    if baseline and not any(item.ratio for item in compared.ratios):
        notes.append(f"No speed-up over {baseline}: no run that was measured has it.")
    progress("writing the report")
    report = _report(compared, figures, notes, drive_writes_tb)
    write_tables([table for table in (report.runs, *report.tables) if table.rows], out / "tables")
    write_exports(selection, out / "data")
    (out / "report.html").write_text(render("report.html.j2", report))
    (out / "report.md").write_text(render("report.md.j2", report))
    return report


def _report(
    compared: Compared, figures: Sequence[Figure], notes: Sequence[str], drive_writes_tb: float
) -> Report:
    found = compared.found
    contexts = [item.context for item in found]
    return Report(
        title=compared.selection.title,
        where=compared.selection.where,
        written=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        measured_between=measured_between(compared.selection),
        counts=status_counts(compared.selection),
        best=compared.best,
        circumstances=tuple(
            name for name in CIRCUMSTANCES if len({getattr(item, name) for item in contexts}) > 1
        ),
        notes=tuple(notes),
        runs=runs_table([item for item in found if not item.planned]),
        tables=tuple(table for table in all_tables(compared, drive_writes_tb) if table.rows),
        figures=tuple(figure for figure in figures if figure.panels),
        not_drawn=tuple(
            f"{figure.title}: {figure.missing}" for figure in figures if figure.missing
        ),
    )


def all_tables(compared: Compared, drive_writes_tb: float) -> list[Table]:
    """Return every table but that of all configurations, in the order of the report."""
    found, baseline = compared.found, compared.baseline
    return [
        best_table(compared.best),
        plans_table(found),
        warnings_table(found),
        failures_table(found),
        *([speedup_table(compared.ratios, baseline)] if baseline else []),
        published_table(compared.published),
        memory_table(found),
        traffic_table(found, drive_writes_tb),
        environment_table(environments(compared.selection, found)),
    ]


def environments(selection: Selection, found: Sequence[Configuration]) -> list[tuple[str, Json]]:
    """Read environment.json of the newest run of each machine and commit, the most used first."""
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
    """Count how many runs came to what end, in a fixed order."""
    number = Counter(run.status for run in selection.runs)
    return tuple(
        (status, words, number[status]) for status, words in STATUS_WORDS.items() if number[status]
    )


def measured_between(selection: Selection) -> str | None:
    """Format the time: '2026-11-22 14:00 to 15:30 UTC'; None where no run says when it started."""
    started = [run.started for run in selection.runs if run.started]
    if not started:
        return None
    first, last = min(started), max(started)
    same_day = "%H:%M UTC" if first.date() == last.date() else "%Y-%m-%d %H:%M UTC"
    return f"{first:%Y-%m-%d %H:%M} to {last.strftime(same_day)}"
