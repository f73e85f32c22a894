"""Tables as files: CSV for machines, Markdown for a page. LaTeX is in latex.py."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from urllib.parse import quote

from multirun_analysis.latex import to_latex
from multirun_analysis.table import Cell, Table
from zinfer.escape import for_csv, for_markdown


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Write each table as .csv, .md and .tex; return the paths."""
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for table in tables:
        for suffix, text in (
            (".csv", to_csv(table)),
            (".md", to_markdown(table)),
            (".tex", to_latex(table)),
        ):
            path = folder / f"{table.name}{suffix}"
            path.write_text(text)
            written.append(path)
    return written


def to_csv(table: Table) -> str:
    """Write plain values in the metrics' own units; unknown is empty. No cell is a formula."""
    rows = [[column.key for column in table.columns]]
    rows += [["" if cell.value is None else cell.value for cell in row] for row in table.rows]  # type: ignore[misc]
    return csv_text(rows)


def csv_text(rows: Sequence[Sequence[object]]) -> str:
    """Write rows as CSV; text that a spreadsheet would run is marked as text."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    for row in rows:
        writer.writerow(for_csv(value) if isinstance(value, str) else value for value in row)
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """Write a table that is aligned in its source too; numbers meet at the decimal point."""
    shown = table.shown
    heads = [table.columns[index] for index in shown]
    cells = [[_markdown(table, row, index) for index in shown] for row in table.rows]
    titles = [for_markdown(column.head) for column in heads]
    widths = [max(3, *(len(row[place]) for row in [titles, *cells])) for place in range(len(shown))]

    def line(row: Sequence[str]) -> str:
        filled = (
            text.rjust(width) if column.number else text.ljust(width)
            for text, width, column in zip(row, widths, heads, strict=True)
        )
        return f"| {' | '.join(filled)} |"

    rules = [
        "-" * (width - 1) + ":" if column.number else "-" * width
        for width, column in zip(widths, heads, strict=True)
    ]
    return "\n".join([line(titles), line(rules), *map(line, cells)]) + "\n"


def _markdown(table: Table, row: Sequence[Cell], index: int) -> str:
    cell = row[index]
    text = for_markdown(cell.text)
    if cell.url:
        return f"[{text}]({quote(cell.url, safe=':/#?&=%')})"
    return text + " " * (len(table.aligned(row, index)) - len(cell.text))
