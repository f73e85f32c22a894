"""Text that people chose is shown as they wrote it, and starts nothing: no style, link, formula or
script.
"""

from __future__ import annotations

import csv
import io
from html.parser import HTMLParser

import pytest

from zinfer.escape import for_csv, for_html, for_latex, for_markdown, for_rich, printable

AS_WRITTEN = [
    "opt-125m nvme bfloat16 b4",
    "[/x]",
    "[INST] tell me [/INST]",
    "[bold red]x",
    "[x](javascript:alert(1))",
    "<script>alert(1)</script>",
    "a\\[b]",
    "ends with \\",
    "=cmd|' /C calc'!A0",
    "50% of $x_1$ & #3 ~ {y}^2",
    "naïve ☃ 模型",
]


@pytest.mark.parametrize("text", AS_WRITTEN)
def test_rich_shows_text_as_written(text: str) -> None:
    from rich.console import Console
    from rich.text import Text

    assert Text.from_markup(f"[b]{for_rich(text)}[/b]").plain == text
    Console(file=io.StringIO()).print(for_rich(text))  # no MarkupError


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("\x1b[31mred\x1b[0m", "\\x1b[31mred\\x1b[0m"),
        ("\x1b]0;title\x07", "\\x1b]0;title\\x07"),
        ("a\x00b\x9bc", "a\\x00b\\x9bc"),
        ("tab\tand\nline", "tab\tand\nline"),
    ],
)
def test_control_characters_are_shown_and_not_obeyed(text: str, shown: str) -> None:
    assert printable(text) == shown


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("decode_step_s", "decode_step_s"),
        ("opt-125m", "opt-125m"),
        ("a|b", "a\\|b"),
        ("[x](javascript:y)", "\\[x\\](javascript:y)"),
        ("<script>", "&lt;script&gt;"),
        ("a\nb", "a b"),
        ("_so_ *it* `is`", "\\_so\\_ \\*it\\* \\`is\\`"),
        ("# head", "\\# head"),
        ("- item", "\\- item"),
        ("1. item", "1\\. item"),
        ("back\\slash", "back\\\\slash"),
        ("a &lt; b", "a &amp;lt; b"),
        ("$x$ ~~y~~", "\\$x\\$ \\~\\~y\\~\\~"),
    ],
)
def test_markdown_marks_nothing(text: str, escaped: str) -> None:
    assert for_markdown(text) == escaped


@pytest.mark.parametrize(
    ("text", "cell"),
    [
        ("=1+1", "'=1+1"),
        ("@SUM(A1)", "'@SUM(A1)"),
        ("+cmd|' /C calc'!A0", "'+cmd|' /C calc'!A0"),
        ("-2+3", "'-2+3"),
        (" =1", "' =1"),
        ("\t=1", "'\t=1"),
        ("-2.5e-3", "-2.5e-3"),
        ("+4", "+4"),
        ("opt-125m", "opt-125m"),
        ("", ""),
    ],
)
def test_no_cell_of_a_spreadsheet_is_a_formula(text: str, cell: str) -> None:
    assert for_csv(text) == cell
    out = io.StringIO()
    csv.writer(out).writerow([for_csv(text)])
    assert next(csv.reader(io.StringIO(out.getvalue())), [""]) == [cell] or not text


@pytest.mark.parametrize(
    ("text", "escaped"),
    [
        ("a_b & 5%", r"a\_b \& 5\%"),
        ("\\input{/etc/passwd}", r"\textbackslash{}input\{/etc/passwd\}"),
        ("$x^2$ ~ #1", r"\$x\textasciicircum{}2\$ \textasciitilde{} \#1"),
        ("a\nb", "a b"),
    ],
)
def test_latex_runs_nothing(text: str, escaped: str) -> None:
    assert for_latex(text) == escaped


@pytest.mark.parametrize(
    "text", ["<img src=x onerror=y>", '"><script>', "' onclick='x", *AS_WRITTEN]
)
def test_html_has_no_tag_of_the_users_own(text: str) -> None:
    found: list[tuple[str, str | None]] = []

    class Reader(HTMLParser):
        def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
            found.extend((tag, value) for _, value in attrs)

    Reader().feed(f'<p title="{for_html(text)}">{for_html(text)}</p>')
    assert found == [("p", text)]
