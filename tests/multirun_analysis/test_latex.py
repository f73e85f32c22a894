"""Tables for a paper: compiled where pdflatex is, and none of them wider than the page."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from multirun_analysis.latex import PAGE_PT, fitting_layout, to_latex
from multirun_analysis.report import write_report
from multirun_analysis.store import read_mlflow
from multirun_analysis.table import Cell, Column, Table
from tests.helpers.report_gallery import STORIES, make_story

PREAMBLE = r"""\documentclass{article}
\usepackage[T1]{fontenc}
\usepackage{booktabs,longtable}
\begin{document}
"""
needs_pdflatex = pytest.mark.skipif(
    shutil.which("pdflatex") is None,
    reason="needs pdflatex: apt-get install texlive-latex-base texlive-latex-recommended",
)


def compiled(body: str, folder: Path) -> str:
    """Return the log of LaTeX over a document with these tables."""
    (folder / "tables.tex").write_text(f"{PREAMBLE}{body}\n\\end{{document}}\n")
    done = subprocess.run(
        ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"],
        cwd=folder,
        capture_output=True,
        text=True,
        errors="replace",
        check=False,
    )
    assert done.returncode == 0, done.stdout[-2000:]
    return (folder / "tables.log").read_text(errors="replace")


def overfull_pt(log: str) -> list[float]:
    """Return by how much each line is too wide."""
    return [float(found) for found in re.findall(r"Overfull \\hbox \(([\d.]+)pt too wide", log)]


@needs_pdflatex
@pytest.mark.slow
@pytest.mark.parametrize("story", [*STORIES, "many"])
def test_every_table_compiles_and_fits_the_page(story: str, tmp_path: Path) -> None:
    write_report(read_mlflow(make_story(story, tmp_path / "store")), tmp_path / "out")
    tables = sorted((tmp_path / "out" / "tables").glob("*.tex"))
    assert tables
    for table in tables:
        log = compiled(table.read_text(), tmp_path)
        assert [wide for wide in overfull_pt(log) if wide > 1] == [], table.name


@needs_pdflatex
@pytest.mark.parametrize(
    "text",
    [
        r"\input{/etc/passwd}",
        "50% of $x_1$ & more ~^ #{}",
        "a|b <tag> \"quoted\" 'x' \x1b[31m",
        "-",
    ],
)
def test_text_of_users_is_text(text: str, tmp_path: Path) -> None:
    columns = (Column(key="a", head=text), Column(key="b", head=text, number=True))
    rows = ((Cell(text=text), Cell(text=text)), (Cell(text="b"), Cell(text="1.5 ± 0.1")))
    table = Table(name="evil", title=text, note=text, columns=columns, rows=rows)
    assert overfull_pt(compiled(to_latex(table), tmp_path)) == []


def test_numbers_meet_at_the_decimal_point() -> None:
    columns = (Column(key="rate", head="tokens/s", number=True),)
    rows = tuple((Cell(text=text),) for text in ("105.2 ± 5.8", "4.213 ± 0.052", "-", "1,230"))
    latex = to_latex(Table(name="t", title="T", note="N", columns=columns, rows=rows))
    for line in (
        r"\begin{tabular}{r@{}l}",
        r"\multicolumn{2}{c}{tokens/s} \\",
        r"105&.2 $\pm$ 5.8 \\",
        r"4&.213 $\pm$ 0.052 \\",
        r"\multicolumn{2}{c}{-} \\",
        r"1,230& \\",
    ):
        assert line in latex


def test_long_text_is_broken_and_the_type_shrinks_before_numbers_do() -> None:
    reason = "device: needs 70.0 GiB, has 48.0 GiB. " * 4
    columns = (Column(key="reason", head="reason"), Column(key="n", head="n", number=True))
    table = Table(
        name="t",
        title="T",
        note="",
        columns=columns,
        rows=((Cell(text=reason), Cell(text="1.25")),),
    )
    layout = fitting_layout(table)
    broken = re.fullmatch(r"p\{(\d+)pt\}", layout.columns[0])
    assert broken and float(broken[1]) < PAGE_PT
    assert layout.columns[1] == "r@{}l"


def test_ids_and_commits_are_not_in_a_papers_table(tmp_path: Path) -> None:
    report = write_report(
        read_mlflow(make_story("one-batch", tmp_path / "store")), tmp_path / "out"
    )
    latex = (tmp_path / "out" / "tables" / "runs.tex").read_text()
    ids = [str(row[-2].value)[:8] for row in report.runs.rows]
    assert ids and not any(one in latex for one in ids)
    assert "a1b2c3d" not in latex
