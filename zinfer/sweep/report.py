"""Write the report of a sweep at its end, and put it beside the sweep's run in MLflow.

`zinfer-report` does it in a process of its own: drawing needs packages that the driver never
imports, and whatever happens to it, the sweep has ended well before.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from zinfer.driver.interrupts import Interrupts
from zinfer.driver.terminal import Terminal
from zinfer.job.files import PARENT_FILE
from zinfer.sweep.record import Sweep
from zinfer.tracking.parent import SweptRun, created_parent
from zinfer.tracking.uri import URI_VARIABLE

FOLDER, LOG = "report", "report.log"
"""In the sweep's folder: the report, and what its process said."""
WAIT_S = 120.0
"""Longest time that the end of a sweep waits for its report."""
LOOK_S = 0.1
FEWEST_RUNS = 2
"""A report compares; of a single run there is nothing to compare."""


def report_sweep(sweep: Sweep, runs: Sequence[SweptRun], terminal: Terminal) -> Path | None:
    """Write SWEEP_DIR/report and upload it; return its page, or None where there is none.

    A report that fails, or takes too long, is said and left out.
    """
    logged = sum(run.run_id is not None for run in runs)
    parent = created_parent(sweep.folder / PARENT_FILE)
    if not sweep.report or parent is None or logged < FEWEST_RUNS or Interrupts.received:
        return None
    terminal.note("writing the report")
    log = sweep.folder / LOG
    command = [sys.executable, "-m", "multirun_analysis", "--run", parent]
    try:
        problem = _run([*command, "--out", str(sweep.folder / FOLDER)], log, sweep.tracking_uri)
    except OSError as error:
        problem = str(error)
    if problem is not None:
        terminal.note(f"no report: {problem}. To write it: zinfer-report --run {parent}")
        return None
    log.unlink(missing_ok=True)
    page = sweep.folder / FOLDER / "report.html"
    terminal.note(f"report {page}")
    return page


def _run(command: list[str], log: Path, uri: str | None) -> str | None:
    """Run the command to its end, WAIT_S at most; return why it failed, or None."""
    environment = {**os.environ, **({URI_VARIABLE: uri} if uri else {})}  # argv is for all to see
    with log.open("w") as said:
        process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=said,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            over_s = time.monotonic() + WAIT_S
            while process.poll() is None:
                if Interrupts.received:
                    return "interrupted"
                if time.monotonic() > over_s:
                    return f"it was not done after {WAIT_S:.0f} s"
                time.sleep(LOOK_S)
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if process.returncode == 0:
        return None
    lines = log.read_text(errors="replace").strip().splitlines()
    return lines[-1] if lines else f"it ended with exit code {process.returncode}"
