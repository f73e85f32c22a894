"""`zinfer-report`: compares runs and writes one folder with a report, its tables and its figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from multirun_analysis.read import ReportError, Selection, read_folder, read_mlflow
from zinfer.tracking.store import TrackingUnavailable

if TYPE_CHECKING:
    from multirun_analysis.report import Report

TERMINAL_ROWS = 40
TERMINAL_MEASURES = (
    "decode_step_s",
    "ceiling_fraction",
    "peak_device_reserved_bytes",
    "peak_host_rss_bytes",
    "commit",
)
"""Shown beside status, choices and tokens/s; the rest is in the report."""


def main(arguments: Sequence[str] | None = None) -> None:
    """The console script. Exit codes: 0 written; 2 there is nothing to report, or it cannot be read."""
    options = parser().parse_args(arguments)
    try:
        written = report(options)
    except (TrackingUnavailable, OSError) as error:  # a ReportError too
        print(f"zinfer-report: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{written / 'report.html'}")


def parser() -> argparse.ArgumentParser:
    """What can be typed."""
    result = argparse.ArgumentParser(
        prog="zinfer-report",
        description="Compares runs and writes one folder: report.html, report.md, tables (CSV, Markdown, LaTeX) and figures (SVG, PNG). "
        "Without arguments: the newest sweep in ./mlflow.db.",
    )
    which = result.add_mutually_exclusive_group()
    which.add_argument("--experiment", metavar="NAME", help="all runs of this experiment")
    which.add_argument(
        "--run", metavar="ID", help="a sweep, by the id of its parent run; or a single run"
    )
    which.add_argument(
        "--from-dir",
        metavar="DIR",
        type=Path,
        help="job folders (outputs, multirun) instead of a run store",
    )
    result.add_argument(
        "--filter",
        metavar="FILTER",
        help="only runs that match, in MLflow's words: \"params.`offload.device` = 'nvme'\"",
    )
    result.add_argument(
        "--uri",
        metavar="URI",
        help="the run store: sqlite:////path/to/mlflow.db or http://host:5000 (default: ./mlflow.db)",
    )
    result.add_argument(
        "--baseline",
        metavar="CHOICE",
        help="what speed-ups are over: offload.device=none (default: the first that varies)",
    )
    result.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: reports/DATE-TIME)"
    )
    return result


def report(options: argparse.Namespace) -> Path:
    """Read, compare, write, and show the table of the runs."""
    from multirun_analysis.ratios import parse_baseline

    try:
        baseline = parse_baseline(options.baseline) if options.baseline else None
    except ValueError as error:
        raise ReportError(str(error)) from None
    selection = select(options)
    from multirun_analysis.report import write_report

    out: Path = options.out or Path("reports") / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    show(write_report(selection, out, baseline))
    return out


def select(options: argparse.Namespace) -> Selection:
    """The runs that were asked for."""
    if options.from_dir is not None:
        if options.filter or options.uri:
            raise ReportError(
                "--from-dir reads job folders: --filter and --uri are for a run store. Drop them, or --from-dir"
            )
        return read_folder(options.from_dir)
    uri = options.uri or "sqlite:///mlflow.db"
    if uri.startswith("sqlite:///"):
        uri = f"sqlite:///{Path(uri.removeprefix('sqlite:///')).absolute()}"
    elif "://" not in uri:
        raise ReportError(
            f"--uri {uri} is no URI of a run store. Type --uri sqlite:///{uri} or --uri http://127.0.0.1:5000"
        )
    return read_mlflow(uri, experiment=options.experiment, run_id=options.run, where=options.filter)


def show(written: Report) -> None:
    """The runs as a table on the terminal, and what a reader should know of them."""
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    from multirun_analysis.compare import RATE

    runs = written.runs
    rate = next(index for index, column in enumerate(runs.columns) if column.key == RATE)
    indices = [
        index
        for index in runs.shown
        if index <= rate or runs.columns[index].key in TERMINAL_MEASURES
    ]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for index in indices:
        column = runs.columns[index]
        table.add_column(column.head, justify="right" if column.number else "left", no_wrap=True)
    for row in runs.rows[:TERMINAL_ROWS]:
        table.add_row(*(Text(row[index].text) for index in indices))
    console = Console(width=None if sys.stdout.isatty() else 160)
    console.print(Text(written.title, style="bold"))
    console.print(table)
    if len(runs.rows) > TERMINAL_ROWS:
        console.print(f"... and {len(runs.rows) - TERMINAL_ROWS} more in the report")
    for note in written.notes:
        console.print(Text(f"- {note}"))


if __name__ == "__main__":
    main()
