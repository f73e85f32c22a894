"""Tables of single ends: the fastest, what failed and why, what runs warned of."""

from __future__ import annotations

from collections.abc import Sequence

from multirun_analysis.best import Best
from multirun_analysis.compare import shown_choices
from multirun_analysis.configuration import RATE, Configuration
from multirun_analysis.runs import STATUS_WORDS, Run
from multirun_analysis.table import (
    Cell,
    Column,
    Table,
    spread_cells,
    spread_columns,
    text_cell,
    whole_cell,
)
from multirun_analysis.tables.choices import choice_cell, choice_columns

NAMED_CONFIGURATIONS = 3


def best_table(best: Sequence[Best]) -> Table:
    """Build the first table that a reader wants: the fastest configuration of each model."""
    contexts = [
        (name, head)
        for name, head in (
            ("weights", "weights"),
            ("device", "machine"),
            ("commit_label", "commit"),
        )
        if len({getattr(item.configuration.context, name) for item in best}) > 1
    ]
    columns = (
        Column(key="model", head="model"),
        Column(key="configuration", head="fastest with"),
        *spread_columns(RATE, "tokens/s", "Median ± standard deviation"),
        Column(key="why", head="why"),
        Column(key="limit", head="what limits it"),
        Column(key="lowest_latency", head="shortest step", screen_only=True),
        *(Column(key=name, head=head) for name, head in contexts),
    )
    rows = tuple(
        (
            text_cell(item.configuration.model),
            text_cell(item.label),
            *spread_cells(item.rate),
            text_cell(item.reason),
            text_cell(item.limit),
            text_cell(item.low_latency or "the same"),
            *(text_cell(getattr(item.configuration.context, name)) for name, _ in contexts),
        )
        for item in best
    )
    return Table(
        name="best",
        title="Best configuration per model",
        note=f"Ranked by generated tokens/s.{_one_place(best)}",
        columns=columns,
        rows=rows,
    )


def _one_place(best: Sequence[Best]) -> str:
    """Name machine, weights and commit once where all rows share them."""
    if not best or len({item.configuration.context for item in best}) > 1:
        return ""
    context = best[0].configuration.context
    return f" {context.device}, {context.weights} weights, commit {context.commit_label}."


def failures_table(found: Sequence[Configuration]) -> Table:
    """Build one row for each way in which a configuration did not end well, with its reason."""
    choices = shown_choices(found)
    ends: dict[tuple[int, str, str], list[Run]] = {}
    for number, item in enumerate(found):
        for run in item.failed_runs:
            key = (number, run.status, run.reason or "no reason was logged")
            ends.setdefault(key, []).append(run)
    columns = (
        Column(key="status", head="what happened"),
        *choice_columns(choices),
        Column(key="reason", head="reason"),
        Column(key="times", head="times", number=True, screen_only=True),
        Column(key="run_ids", head="newest run", screen_only=True),
    )
    rows = tuple(
        (
            text_cell(STATUS_WORDS.get(status, status), kind=status),
            *(choice_cell(found[number], choice) for choice in choices),
            text_cell(reason),
            whole_cell(len(runs)),
            _runs_cell(runs),
        )
        for (number, status, reason), runs in ends.items()
    )
    note = "Runs that did not end well stay in every count."
    return Table(
        name="failures", title="What failed, and why", note=note, columns=columns, rows=rows
    )


def _runs_cell(runs: Sequence[Run]) -> Cell:
    newest = runs[-1]
    return Cell(
        text=newest.run_id[:8] if newest.url else newest.name,
        value=" ".join(run.run_id for run in runs),
        url=newest.url,
    )


def warnings_table(found: Sequence[Configuration]) -> Table:
    """Build one row for each sentence that runs said about themselves, verdicts included."""
    names = shown_choices(found)
    said: dict[tuple[str, str], list[tuple[Configuration, Run]]] = {}
    for item in found:
        for run in item.runs:
            for kind, sentence in _sentences(run):
                said.setdefault((kind, sentence), []).append((item, run))
    columns = (
        Column(key="kind", head="kind"),
        Column(key="sentence", head="what the runs said"),
        Column(key="times", head="runs", number=True),
        Column(key="configurations", head="of"),
        Column(key="run_ids", head="newest run", screen_only=True),
    )
    rows = tuple(
        (
            text_cell(kind, kind=kind),
            text_cell(sentence),
            whole_cell(len(runs)),
            text_cell(_named([item for item, _ in runs], names)),
            _runs_cell([run for _, run in runs]),
        )
        for (kind, sentence), runs in said.items()
    )
    note = "The same sentence of several runs is one row."
    return Table(
        name="warnings", title="Warnings and verdicts", note=note, columns=columns, rows=rows
    )


def _sentences(run: Run) -> list[tuple[str, str]]:
    """Return (kind, sentence) of a run: its verdict once, though it is a warning too."""
    if run.status != "ok" or run.stability in (None, "stable"):
        return [("warning", sentence) for sentence in run.warnings]
    reason = "; ".join(run.tags.get("zinfer.stability_reason", "").splitlines())
    others = [each for each in run.warnings if not (reason and reason in each)]
    verdict = (str(run.stability), reason or "no reason was logged")
    return [verdict, *(("warning", sentence) for sentence in others)]


def _named(items: Sequence[Configuration], names: Sequence[str]) -> str:
    labels = list(dict.fromkeys(item.label(names) for item in items))
    more = len(labels) - NAMED_CONFIGURATIONS
    return "; ".join(labels[:NAMED_CONFIGURATIONS]) + (f"; and {more} more" if more > 0 else "")
