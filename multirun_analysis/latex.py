"""Tables for a paper: LaTeX that needs only booktabs and fits the width of an article's page."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from multirun_analysis.table import Cell, Table
from zinfer.escape import for_latex

PAGE_PT = 345.0
"""Text width of the article class at 10 pt."""
SIZES = (("small", 4.9), ("footnotesize", 4.5), ("scriptsize", 4.1), ("tiny", 3.4))
"""Command, and points of an average character: digits of Computer Modern are half an em wide."""
SEPARATION_PT = 3.0
WRAPPED_CHARACTERS = 16
"""A column of longer text is broken into lines."""
NARROWEST_CHARACTERS = 9
PAGE_ROWS = 45


@dataclass(frozen=True)
class Layout:
    """How one table is set."""

    size: str
    columns: tuple[str, ...]
    """The argument of tabular, one part for each column."""


def to_latex(table: Table) -> str:
    """Set a table; one with more rows than a page holds becomes a longtable.

    Numbers meet at the decimal point: each column of numbers is two, the whole part and the rest.
    The preamble needs booktabs, \\usepackage[T1]{fontenc}, and longtable for long ones.
    """
    long = len(table.rows) > PAGE_ROWS
    layout = fitting_layout(table)
    head = " & ".join(_head(table, index) for index in table.printed) + r" \\"
    body = [
        " & ".join(_cell(table, row, index) for index in table.printed) + r" \\"
        for row in table.rows
    ]
    caption = rf"\caption{{{for_latex(table.title)}. {for_latex(table.note)}}}"
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
    """Choose the largest type at which the table is as wide as the page; break long text."""
    natural = [_characters(table, index) for index in table.printed]
    for size, point in SIZES:
        room = PAGE_PT - 2 * SEPARATION_PT * len(natural)
        widths = _widths(table, natural, room / point)
        if sum(widths) * point <= room or size == SIZES[-1][0]:
            columns = tuple(
                _column(table, index, width, full, point)
                for index, width, full in zip(table.printed, widths, natural, strict=True)
            )
            return Layout(size, columns)
    raise AssertionError("the last size is always taken")


def _widths(table: Table, natural: Sequence[int], room: float) -> list[float]:
    """Characters of each column: broken ones share what the others leave."""
    breakable = [
        width > WRAPPED_CHARACTERS and not table.columns[index].number
        for index, width in zip(table.printed, natural, strict=True)
    ]
    fixed = sum(width for width, broken in zip(natural, breakable, strict=True) if not broken)
    wanted = sum(width for width, broken in zip(natural, breakable, strict=True) if broken)
    if not wanted:
        return list(map(float, natural))
    share = min(1.0, max(0.0, room - fixed) / wanted)
    return [
        max(NARROWEST_CHARACTERS, width * share) if broken else float(width)
        for width, broken in zip(natural, breakable, strict=True)
    ]


def _column(table: Table, index: int, width: float, full: int, point: float) -> str:
    if table.columns[index].number:
        return "r@{}l" if table.fraction_widths[index] else "r"
    if width < full:
        return rf"p{{{width * point:.0f}pt}}"
    return "l"


def _characters(table: Table, index: int) -> int:
    """Widest line of a column: its head, or the whole part and the fraction of its numbers."""
    cells = [row[index] for row in table.rows]
    head = len(table.columns[index].head)
    if table.columns[index].number:
        whole = max((len(cell.whole) for cell in cells), default=0)
        return max(head, whole + table.fraction_widths[index])
    return max([head, *(len(cell.text) for cell in cells)])


def _head(table: Table, index: int) -> str:
    text = for_latex(table.columns[index].head)
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
