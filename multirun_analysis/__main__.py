"""`zinfer-report`: compares runs and writes one folder with a report, its tables and figures."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

import zinfer
from multirun_analysis.command import parser
from multirun_analysis.progress import Progress, shown_progress
from multirun_analysis.runs import ReportError, Selection
from multirun_analysis.terminal import show, show_against
from zinfer.tracking.store import TrackingUnavailable

if TYPE_CHECKING:
    from multirun_analysis.against import Against
    from multirun_analysis.report import Report

CHECKOUT = Path(zinfer.__file__).parent.parent
"""Repository whose commits runs are logged with, where zinfer runs from one."""


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
        earlier = select_earlier(options, progress) if options.against else None
        selection = select(options, progress)
        pairs = paired(selection, earlier) if earlier is not None else None
        from multirun_analysis.report import write_report

        written = write_report(
            selection, out, baseline, progress, drive_writes_tb=options.drive_tbw
        )
        if selection.parent is not None and options.upload:
            progress("putting the report beside the sweep's run")
            _upload(options, selection, out, written)
    show(written)
    code = show_pairs(pairs, options.fail_if_slower or 0.0, out) if pairs is not None else 0
    print(out / "report.html")
    return code


def select_earlier(options: argparse.Namespace, progress: Progress) -> Selection:
    """Read the runs that --against names, before anything else is done."""
    _require_store(options)
    from multirun_analysis.against import earlier_selection
    from multirun_analysis.store import opened_store, store_uri

    with opened_store(store_uri(options.uri), progress) as store:
        return earlier_selection(store, options.against, CHECKOUT)


def select(options: argparse.Namespace, progress: Progress) -> Selection:
    """Read the runs that were asked for."""
    if options.from_dir is not None:
        _require_store(options)
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


def _require_store(options: argparse.Namespace) -> None:
    """Refuse options that only a run store has an answer to.

    Raises:
        ReportError: one of them stands beside --from-dir.
    """
    if options.from_dir is not None and (options.filter or options.uri or options.against):
        raise ReportError(
            "--from-dir reads job folders: --filter, --uri and --against are for a run store. "
            "Drop them, or --from-dir"
        )


def paired(selection: Selection, earlier: Selection) -> Against:
    """Pair the runs with earlier ones.

    Raises:
        ReportError: none has a pair.
    """
    from multirun_analysis.against import compare_against

    found = compare_against(selection, earlier)
    if not found.pairs:
        raise ReportError(
            f"nothing in {found.before} is paired with {found.now}: no configuration with the same "
            "choices, machine, weights and method is in both. Set --against to another commit, "
            "run or experiment"
        )
    return found


def show_pairs(found: Against, allowed: float, out: Path) -> int:
    """Write and show the pairs; return 1 where one is slower by more than `allowed`, a share."""
    from multirun_analysis.against import against_table
    from multirun_analysis.formats import write_tables

    table = against_table(found)
    write_tables([table], out / "tables")
    show_against(found, table, allowed)
    return 1 if found.failed(allowed) else 0


if __name__ == "__main__":
    main()
