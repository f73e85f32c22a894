"""`zinfer-report`: compares runs and writes one folder with a report, its tables and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from multirun_analysis.command import parser
from multirun_analysis.progress import Progress, shown_progress
from multirun_analysis.runs import ReportError, Selection
from multirun_analysis.terminal import show, show_against
from zinfer.tracking.store import TrackingUnavailable

if TYPE_CHECKING:
    from multirun_analysis.report import Report


def main(arguments: Sequence[str] | None = None) -> None:
    """Run the console script. Exit codes: 0 written; 1 slower than before; 2 nothing to report."""
    options = parser().parse_args(arguments)
    try:
        code = report(options)
    except (TrackingUnavailable, OSError) as error:  # a ReportError too
        print(f"zinfer-report: {error}", file=sys.stderr)
        sys.exit(2)
    if code:
        sys.exit(code)


def report(options: argparse.Namespace) -> int:
    """Read, compare, write and show; return the exit code."""
    from multirun_analysis.ratios import parse_baseline

    try:
        baseline = parse_baseline(options.baseline) if options.baseline else None
    except ValueError as error:
        raise ReportError(str(error)) from None
    if options.fail_if_slower is not None and options.against is None:
        raise ReportError("--fail-if-slower needs what to compare with. Set --against EARLIER")
    out: Path = options.out or Path("reports") / datetime.now().strftime("%Y-%m-%d-%H-%M-%S")
    with shown_progress() as progress:
        selection = select(options, progress)
        from multirun_analysis.report import write_report

        written = write_report(selection, out, baseline, progress)
        if selection.parent is not None and options.upload:
            progress("putting the report beside the sweep's run")
            _upload(options, selection, out, written)
    show(written)
    code = compare_with_earlier(options, selection, out) if options.against else 0
    print(out / "report.html")
    return code


def select(options: argparse.Namespace, progress: Progress) -> Selection:
    """Read the runs that were asked for."""
    if options.from_dir is not None:
        if options.filter or options.uri or options.against:
            raise ReportError(
                "--from-dir reads job folders: --filter, --uri and --against are for a run store. "
                "Drop them, or --from-dir"
            )
        from multirun_analysis.folders import read_folder

        return read_folder(options.from_dir, progress)
    from multirun_analysis.store import read_mlflow, store_uri

    return read_mlflow(
        store_uri(options.uri),
        experiment=options.experiment,
        run_id=options.run,
        where=options.filter,
        progress=progress,
    )


def _upload(options: argparse.Namespace, selection: Selection, out: Path, written: Report) -> None:
    """Put the report beside the sweep's run; a store that refuses is said, the report is there."""
    from multirun_analysis.store import store_uri
    from multirun_analysis.upload import upload_report

    assert selection.parent is not None
    try:
        upload_report(store_uri(options.uri), selection.parent, written, out)
    except ReportError as error:
        print(f"zinfer-report: the sweep's run does not have this report: {error}", file=sys.stderr)


def compare_with_earlier(options: argparse.Namespace, selection: Selection, out: Path) -> int:
    """Pair the runs with earlier ones; return 1 where one is slower than allowed."""
    from multirun_analysis.against import against_table, compare_against, earlier_selection
    from multirun_analysis.formats import write_tables
    from multirun_analysis.store import opened_store, store_uri

    with opened_store(store_uri(options.uri)) as store:
        found = compare_against(selection, earlier_selection(store, options.against))
    if not found.pairs:
        raise ReportError(
            f"nothing in {found.before} is paired with {found.now}: no configuration with the same "
            "choices, machine, weights and method is in both"
        )
    table = against_table(found)
    write_tables([table], out / "tables")
    allowed = options.fail_if_slower or 0.0
    show_against(found, table, allowed)
    return 1 if found.failed(allowed) else 0


if __name__ == "__main__":
    main()
