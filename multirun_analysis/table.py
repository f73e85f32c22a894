"""What a table is, and how it becomes CSV, Markdown and LaTeX. A cell has its text for people and its value for machines."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from multirun_analysis.spread import Spread, format_number, format_spread, scaled


@dataclass(frozen=True, kw_only=True)
class Column:
    """One column; `key` is its name in CSV, with the unit, `head` what people read."""

    key: str
    head: str
    number: bool = False
    csv_only: bool = False
    help: str | None = None
    """What the number is, shown when the head is pointed at."""


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One value: as text, and as it sorts and goes into CSV (None: unknown)."""

    text: str
    value: float | str | None = None
    url: str | None = None
    kind: str | None = None
    """For the report's style: a status or a standing."""


@dataclass(frozen=True, kw_only=True)
class Table:
    """A table with its caption."""

    name: str
    """File name without suffix."""
    title: str
    note: str
    columns: tuple[Column, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def shown(self) -> tuple[int, ...]:
        """Indices of the columns that people see."""
        return tuple(index for index, column in enumerate(self.columns) if not column.csv_only)


def text_cell(text: object, kind: str | None = None, url: str | None = None) -> Cell:
    """Text that sorts as itself; '-' for None."""
    return Cell(
        text="-" if text is None else str(text),
        value=None if text is None else str(text),
        kind=kind,
        url=url,
    )


def number_cell(value: float | None, scale: float = 1.0, digits: int = 3) -> Cell:
    """A number in the column's unit: `scale` divides what people see, CSV keeps the metric's own unit."""
    return Cell(text=format_number(None if value is None else value / scale, digits), value=value)


def whole_cell(value: int | None) -> Cell:
    """A count."""
    return Cell(text="-" if value is None else str(value), value=value)


def spread_cells(spread: Spread | None, scale: float = 1.0) -> tuple[Cell, Cell, Cell]:
    """Median ± standard deviation for people; median, standard deviation and count for CSV."""
    shown = None if spread is None else scaled(spread, 1 / scale)
    median = Cell(text=format_spread(shown), value=spread.median if spread else None)
    return (
        median,
        Cell(text="", value=spread.stddev if spread else None),
        Cell(text=str(spread.count) if spread else "-", value=spread.count if spread else None),
    )


def spread_columns(key: str, head: str, help_: str) -> tuple[Column, Column, Column]:
    return (
        Column(key=key, head=head, number=True, help=help_),
        Column(key=f"{key}_stddev", head="", number=True, csv_only=True),
        Column(
            key=f"{key}_values",
            head="n",
            number=True,
            help="Timed generations behind the number, over all reruns",
        ),
    )


# Formats


def write_tables(tables: Sequence[Table], folder: Path) -> list[Path]:
    """Each as .csv, .md and .tex."""
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
    """Plain values in the metrics' own units; unknown is empty."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(column.key for column in table.columns)
    for row in table.rows:
        writer.writerow(cell.value if cell.value is not None else "" for cell in row)
    return out.getvalue()


def to_markdown(table: Table) -> str:
    """A GitHub table, numbers to the right."""
    heads = [table.columns[index] for index in table.shown]
    lines = [
        "| " + " | ".join(_markdown(column.head) for column in heads) + " |",
        "| " + " | ".join("---:" if column.number else "---" for column in heads) + " |",
    ]
    for row in table.rows:
        cells = (row[index] for index in table.shown)
        lines.append(
            "| "
            + " | ".join(
                f"[{_markdown(cell.text)}]({cell.url})" if cell.url else _markdown(cell.text)
                for cell in cells
            )
            + " |"
        )
    return "\n".join(lines) + "\n"


def _markdown(text: str) -> str:
    return (
        text.replace("\\", "\\\\")
        .replace("|", "\\|")
        .replace("\n", " ")
        .replace("<", "&lt;")
        .replace("*", "\\*")
    )


LATEX_ESCAPES = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_", "{": r"\{", "}": r"\}",
    "~": r"\textasciitilde{}", "^": r"\textasciicircum{}", "±": r"$\pm$", "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}",
    "\n": " ",
})  # fmt: skip


def to_latex(table: Table) -> str:
    """A table that needs only \\usepackage{booktabs}; more rows than a page holds use longtable."""
    heads = [table.columns[index] for index in table.shown]
    layout = "".join("r" if column.number else "l" for column in heads)
    head = " & ".join(column.head.translate(LATEX_ESCAPES) for column in heads) + r" \\"
    body = [
        " & ".join(row[index].text.translate(LATEX_ESCAPES) for index in table.shown) + r" \\"
        for row in table.rows
    ]
    caption = rf"\caption{{{table.title.translate(LATEX_ESCAPES)}. {table.note.translate(LATEX_ESCAPES)}}}"
    label = rf"\label{{tab:zinfer-{table.name}}}"
    if len(body) > 50:
        start = [
            r"% \usepackage{booktabs,longtable}",
            rf"\begin{{longtable}}{{{layout}}}",
            caption + label + r"\\",
        ]
        return "\n".join(
            [
                *start,
                r"\toprule",
                head,
                r"\midrule",
                r"\endhead",
                *body,
                r"\bottomrule",
                r"\end{longtable}",
                "",
            ]
        )
    start = [
        r"% \usepackage{booktabs}",
        r"\begin{table}",
        r"\centering",
        caption,
        label,
        rf"\begin{{tabular}}{{{layout}}}",
    ]
    return "\n".join(
        [
            *start,
            r"\toprule",
            head,
            r"\midrule",
            *body,
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
            "",
        ]
    )
