"""Tables for a paper: LaTeX that needs only booktabs and fits the width of an article's page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from multirun_analysis.table import Cell, Table
from zinfer.escape import for_latex

PAGE_PT = 345.0
"""Text width of the article class at 10 pt."""
SIZES = (("small", 5.4), ("footnotesize", 5.0), ("scriptsize", 4.6))
"""Command, and points of an average character: text of mixed letters is wider than digits."""
SMALLEST = ("tiny", 3.9)
"""For a table that has no optional column left."""
SEPARATION_PT = 3.0
WRAPPED_CHARACTERS = 16
"""A column of longer text is broken into lines."""
NARROWEST_CHARACTERS = 9
PAGE_ROWS = 45
HEAD_PARTS = re.compile(r"[^ ._]*[ ._]|[^ ._]+$")


@dataclass(frozen=True)
class Layout:
    """Layout of one table: its columns and their widths."""

    size: str
    indices: tuple[int, ...]
    """Of the table's columns, those that are set."""
    columns: tuple[str, ...]
    """The argument of tabular, one part for each column."""


def to_latex(table: Table) -> str:
    """Set a table; one with more rows than a page holds becomes a longtable.

    Numbers meet at the decimal point: each column of numbers is two, the whole part and the rest.
    The preamble needs booktabs, \\usepackage[T1]{fontenc}, and longtable for long ones.
    """
    long = len(table.rows) > PAGE_ROWS
    layout = fitting_layout(table)
    head = " & ".join(_head(table, index) for index in layout.indices) + r" \\"
    body = [
        " & ".join(_cell(table, row, index) for index in layout.indices) + r" \\"
        for row in table.rows
    ]
    more = "" if layout.indices == table.printed else f" More columns are in {table.name}.csv."
    caption = rf"\caption{{{for_latex(table.title)}. {for_latex(table.note + more)}}}"
    label = rf"\label{{tab:zinfer-{table.name}}}"
    separation = rf"\setlength{{\tabcolsep}}{{{SEPARATION_PT:g}pt}}"
    settings = [rf"\{layout.size}\sloppy", separation]
    columns = "".join(layout.columns)
    if long:
        return "\n".join(
            [
                r"% \usepackage{booktabs,longtable} \usepackage[T1]{fontenc}",
                r"\begingroup",
                *settings,
                rf"\begin{{longtable}}{{{columns}}}",
                rf"{caption}{label}\\",
                *(r"\toprule", head, r"\midrule", r"\endhead"),
                *body,
                *(r"\bottomrule", r"\end{longtable}", r"\endgroup", ""),
            ]
        )
    return "\n".join(
        [
            r"% \usepackage{booktabs} \usepackage[T1]{fontenc}",
            r"\begin{table}",
            r"\centering",
            *(caption, label),
            *settings,
            rf"\begin{{tabular}}{{{columns}}}",
            *(r"\toprule", head, r"\midrule"),
            *body,
            *(r"\bottomrule", r"\end{tabular}", r"\end{table}", ""),
        ]
    )


def fitting_layout(table: Table) -> Layout:
    """Choose the largest type at which the table is as wide as the page; break long text.

    Where not even scriptsize is narrow enough, optional columns are left out, from the right; where
    there is none left, the type is tiny.
    """
    indices = table.printed
    while True:
        for size, point in SIZES:
            room = PAGE_PT - 2 * SEPARATION_PT * len(indices)
            widths = _widths(table, indices, room / point)
            if sum(widths) * point <= room:
                return _layout(table, indices, widths, size, point)
        optional = [index for index in indices if table.columns[index].optional]
        if not optional:
            room = PAGE_PT - 2 * SEPARATION_PT * len(indices)
            size, point = SMALLEST
            return _layout(table, indices, _widths(table, indices, room / point), size, point)
        indices = tuple(index for index in indices if index != optional[-1])


def _layout(
    table: Table, indices: tuple[int, ...], widths: Sequence[float], size: str, point: float
) -> Layout:
    columns = tuple(
        _column(table, index, width, point) for index, width in zip(indices, widths, strict=True)
    )
    return Layout(size, indices, columns)


def _widths(table: Table, indices: Sequence[int], room: float) -> list[float]:
    """Return the characters of each column: broken ones share what the others leave."""
    natural = [_characters(table, index) for index in indices]
    breakable = [
        width > WRAPPED_CHARACTERS and not table.columns[index].number
        for index, width in zip(indices, natural, strict=True)
    ]
    fixed = sum(width for width, broken in zip(natural, breakable, strict=True) if not broken)
    wanted = sum(width for width, broken in zip(natural, breakable, strict=True) if broken)
    share = min(1.0, max(0.0, room - fixed) / wanted) if wanted else 1.0
    return [
        max(NARROWEST_CHARACTERS, width * share) if broken else float(width)
        for width, broken in zip(natural, breakable, strict=True)
    ]


def _column(table: Table, index: int, width: float, point: float) -> str:
    if table.columns[index].number:
        return "r@{}l" if table.fraction_widths[index] else "r"
    if width < _characters(table, index):
        return rf"p{{{width * point:.0f}pt}}"
    return "l"


def _characters(table: Table, index: int) -> int:
    """Return the widest line of a column: of its head, or of its cells."""
    head = max(map(len, head_lines(table, index)))
    return max(head, _content_characters(table, index))


def _content_characters(table: Table, index: int) -> int:
    cells = [row[index] for row in table.rows]
    if table.columns[index].number:
        whole = max((len(cell.whole) for cell in cells), default=0)
        return whole + table.fraction_widths[index]
    return max((len(cell.text) for cell in cells), default=0)


def head_lines(table: Table, index: int) -> list[str]:
    """Break a head at spaces, dots and underscores into lines as narrow as the column."""
    parts = HEAD_PARTS.findall(table.columns[index].head) or [""]
    width = max(_content_characters(table, index), *(len(part.strip()) for part in parts))
    lines = [""]
    for part in parts:
        if lines[-1] and len((lines[-1] + part).strip()) > width:
            lines.append("")
        lines[-1] += part
    return [line.strip() for line in lines]


def _head(table: Table, index: int) -> str:
    lines = [for_latex(line) for line in head_lines(table, index)]
    text = lines[0]
    if len(lines) > 1:
        side = "r" if table.columns[index].number else "l"
        stacked = r"\\".join(lines)
        text = rf"\begin{{tabular}}[b]{{@{{}}{side}@{{}}}}{stacked}\end{{tabular}}"
    return rf"\multicolumn{{2}}{{c}}{{{text}}}" if table.fraction_widths[index] else text


def _cell(table: Table, row: Sequence[Cell], index: int) -> str:
    cell = row[index]
    if not table.fraction_widths[index]:
        return _breakable(cell.text) if not table.columns[index].number else for_latex(cell.text)
    if not cell.fraction and not cell.whole[-1:].isdigit():
        return rf"\multicolumn{{2}}{{c}}{{{for_latex(cell.text)}}}"
    return f"{for_latex(cell.whole)}&{for_latex(cell.fraction)}"


def _breakable(text: str) -> str:
    """Escape, and let long names break after their marks."""
    escaped = for_latex(text)
    for mark in (r"\_", "/", "=", ","):
        escaped = escaped.replace(mark, rf"{mark}\allowbreak{{}}")
    return escaped
