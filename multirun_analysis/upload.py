"""The report of a sweep beside the sweep's run in MLflow: files, table and a description."""

from __future__ import annotations

from pathlib import Path

from multirun_analysis.formats import to_markdown
from multirun_analysis.report import Report
from multirun_analysis.store import opened_store
from zinfer.escape import for_markdown

ARTIFACTS = "report"
NOTE_TAG = "mlflow.note.content"
"""MLflow shows this Markdown on the page of the run."""
NOTE_CHARACTERS = 7900
"""MLflow cuts a tag behind 8,000."""


def upload_report(uri: str, parent: str, report: Report, folder: Path) -> None:
    """Log the report's folder as artifacts of the sweep's run, and describe the sweep there.

    Raises:
        ReportError: the store does not take it.
    """
    with opened_store(uri) as store:
        store.client.log_artifacts(parent, str(folder), ARTIFACTS)
        store.client.set_tag(parent, NOTE_TAG, description(report))


def description(report: Report) -> str:
    """Write the sweep as Markdown: how it ended, the best, what to know, and the table if short."""
    counts = ", ".join(f"{count} {words}" for _, words, count in report.counts)
    parts = [f"{counts}. The whole report: artifacts, {ARTIFACTS}/report.html."]
    best = report.table("best")
    if best is not None:
        parts.append(to_markdown(best))
    parts.append("\n".join(f"- {for_markdown(note)}" for note in report.notes))
    for table in (report.runs, report.table("plans")):
        if table is not None and table.rows:
            parts.append(to_markdown(table))
    kept: list[str] = []
    for part in filter(None, parts):
        if sum(map(len, kept)) + len(part) + 2 * len(kept) <= NOTE_CHARACTERS:
            kept.append(part)
    return "\n\n".join(kept)
