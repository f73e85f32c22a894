"""The options of `zinfer-report`."""

from __future__ import annotations

import argparse
from pathlib import Path

DRIVE_WRITES_TB = 600.0
"""Rated endurance of a common 1 TB drive.

Source: Samsung's specification of the SSD 990 PRO 1 TB, MZ-V9P1T0BW: 600 TBW over five years.
"""

DESCRIPTION = (
    "Compares runs and writes one folder: report.html, report.md, tables (CSV, Markdown, LaTeX), "
    "figures (SVG, PNG) and data (CSV, JSON lines, Parquet). Without arguments: the newest sweep "
    "in ./mlflow.db."
)
EXIT_CODES = (
    "Exit codes: 0 written; 1 with --against, a configuration is slower than before beyond its "
    "error; 2 there is nothing to report, or it cannot be read."
)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    result = argparse.ArgumentParser(
        prog="zinfer-report", description=DESCRIPTION, epilog=EXIT_CODES
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
        help="the run store: sqlite:////path/to/mlflow.db or http://host:5000 (default: "
        "MLFLOW_TRACKING_URI, else ./mlflow.db)",
    )
    result.add_argument(
        "--baseline",
        metavar="CHOICE",
        help="what speed-ups are over: offload.device=none (default: the first that varies)",
    )
    result.add_argument(
        "--against",
        metavar="EARLIER",
        help="compare with earlier runs: a commit (its digits, or a name that git knows, such as "
        "HEAD~1), the id of a sweep's or a single run, or the name of an experiment",
    )
    result.add_argument(
        "--fail-if-slower",
        metavar="SHARE",
        type=share,
        default=None,
        help="with --against: exit code 1 only where a configuration is slower by more than this "
        "(5%%) and beyond its error (default: 0%%)",
    )
    result.add_argument(
        "--out", metavar="DIR", type=Path, help="where to write (default: reports/DATE-TIME)"
    )
    result.add_argument(
        "--drive-tbw",
        metavar="TB",
        type=terabytes,
        default=DRIVE_WRITES_TB,
        help="terabytes of writes that your NVMe drive is rated for (TBW in its data sheet; "
        f"default: {DRIVE_WRITES_TB:g}, of a common 1 TB drive)",
    )
    result.add_argument(
        "--no-upload",
        dest="upload",
        action="store_false",
        help="do not put the report of a whole sweep beside the sweep's run in the store",
    )
    return result


def share(text: str) -> float:
    """Parse '5%' or '0.05' as 0.05."""
    number = float(text.removesuffix("%")) / (100 if text.endswith("%") else 1)
    if not 0 <= number < 1:
        raise argparse.ArgumentTypeError(f"{text} is no share below 100%. Set 5%")
    return number


def terabytes(text: str) -> float:
    """Parse a number above 0, '1200' or '1200TB', as 1200.0."""
    number = float(text.upper().removesuffix("W").removesuffix("TB"))
    if not 0 < number < float("inf"):
        raise argparse.ArgumentTypeError(f"{text} is no number of terabytes. Set 1200")
    return number
