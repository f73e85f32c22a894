"""Escape text that people chose (names, tags, prompts) for the place where it will be shown.

One function for each place: a terminal (rich), Markdown, CSV, LaTeX, HTML. Call exactly one of
them, at the moment of writing; text that is kept or compared is never escaped.
"""

from __future__ import annotations

import html
import re

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")
"""Characters that move a terminal's cursor or change its colours; tab and newline are not."""
FORMULA = re.compile(r"^[\s\x00]*[=+\-@\t\r|]")
"""Spreadsheets run a cell that starts like this. Source: OWASP, "CSV Injection"."""
NUMBER = re.compile(r"^[+-]?(\d+(\.\d*)?|\.\d+)([eE][+-]?\d+)?$")
MARKDOWN = re.compile(r"[\\`*\[\]|~$]|(?<![A-Za-z0-9])_|_(?![A-Za-z0-9])")
"""Marks that start emphasis, code, a link, a table cell or mathematics, wherever they stand.

An underscore inside a word starts nothing, so `decode_step_s` stays as it is.
"""
MARKDOWN_LINE = re.compile(r"^(\s*)([#+\-=]|\d+(?=[.)]\s))")
"""Marks that start a heading, a list or a rule, at the beginning of a line only."""
LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "&": r"\&", "%": r"\%", "$": r"\$", "#": r"\#", "_": r"\_",
    "{": r"\{", "}": r"\}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "±": r"$\pm$", "×": r"$\times$", "<": r"\textless{}", ">": r"\textgreater{}", "\n": " ",
    "|": r"\textbar{}", '"': r"\textquotedbl{}",
})  # fmt: skip


def printable(text: str) -> str:
    r"""Show control characters as `\x1b` instead of obeying them."""
    return CONTROL.sub(lambda found: f"\\x{ord(found.group()):02x}", text)


def for_rich(text: str) -> str:
    """Escape for rich: `[/x]` in a name is text, not the end of a style."""
    from rich.markup import escape

    return escape(printable(text))


def for_markdown(text: str) -> str:
    """Escape for one line or one table cell of Markdown, also where HTML is allowed in it."""
    text = html.escape(printable(text).replace("\r", " ").replace("\n", " "), quote=False)
    text = MARKDOWN.sub(lambda found: "\\" + found.group(), text)
    return MARKDOWN_LINE.sub(_escape_line_start, text)


def for_csv(text: str) -> str:
    """Mark text that a spreadsheet would run as a formula; numbers stay numbers."""
    text = printable(text)
    return f"'{text}" if FORMULA.match(text) and not NUMBER.match(text) else text


def for_latex(text: str) -> str:
    """Escape for LaTeX text; the preamble needs `textcomp`, which LaTeX has since 2020."""
    return printable(text).translate(LATEX)


def for_html(text: str) -> str:
    """Escape for HTML text and for attribute values in quotes."""
    return html.escape(printable(text), quote=True)


def _escape_line_start(found: re.Match[str]) -> str:
    space, mark = found.groups()
    return f"{space}{mark}\\" if mark.isdecimal() else f"{space}\\{mark}"
