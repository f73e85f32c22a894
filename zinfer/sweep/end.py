"""The end of a sweep, whatever end it was: every job accounted for, one table or document, the exit code, how to go on."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from dataclasses import asdict

from zinfer.driver.orphans import close_abandoned
from zinfer.driver.terminal import Terminal
from zinfer.driver.workers import Servers
from zinfer.job.files import RESULT_FILE, REUSED_FILE
from zinfer.job.folder import is_driven, read_json
from zinfer.job.outcome import INTERRUPTED, EndedBy, Json, Status
from zinfer.redact import redact
from zinfer.sweep.job import ended_well
from zinfer.sweep.record import Sweep
from zinfer.sweep.start import Started
from zinfer.sweep.table import result_table

STOP_WAIT_S = 4.0
"""For jobs in other processes that have been told to stop."""

SWEEP_STATUS: dict[int, Status] = {0: "ok", INTERRUPTED: "killed"}
"""Exit code -> status of the sweep's own run; error for all others."""

Row = tuple[int, list[str], Json | None]
"""Number, overrides, and result.json or reused.json; None for a job that has neither."""


def end_sweep(sweep: Sweep, *, interrupted: bool) -> int:
    """Account for every job, show it, and return the exit code."""
    terminal = Terminal(sweep.output_format)
    Servers.close()
    if sweep.preview:
        return end_preview(sweep)
    if interrupted:
        sweep.stop("interrupted")
        wait_for_jobs(sweep)
    close_abandoned(terminal)  # of jobs whose process a launcher has killed
    rows = list(rows_of(sweep))
    code = exit_code(rows, interrupted=interrupted)
    status = SWEEP_STATUS.get(code, "error")
    if sweep.output_format == "json":
        print(
            json.dumps(
                redact(
                    document(
                        rows,
                        status="interrupted" if interrupted else ("ok" if code == 0 else "failed"),
                    )
                )
            ),
            flush=True,
        )
    else:
        terminal.table(result_table(sweep, rows))
        print_how_to_go_on(sweep, rows, terminal, interrupted=interrupted)
    Started.parent.end(status)
    Started.held.close()
    return code


def end_preview(sweep: Sweep) -> int:
    """Exit code 0 when every job would run or is there; 2 when one would be refused."""
    assert sweep.jobs is not None
    jobs = []
    for job in sweep.jobs:
        earlier = sweep.reusable.get(str(job.key)) if job.state == "reused" else None
        jobs.append({**asdict(job), "run_id": earlier.run_id if earlier else None})
    if sweep.output_format == "json":
        print(json.dumps(redact({"status": "preview", "jobs": jobs})), flush=True)
    Started.held.close()
    return 2 if any(job.verdict in ("does_not_fit", "refused") for job in sweep.jobs) else 0


def wait_for_jobs(sweep: Sweep) -> None:
    """Jobs in other processes end in order when they see that the sweep has stopped."""
    deadline_s = time.monotonic() + STOP_WAIT_S
    while time.monotonic() < deadline_s and any(is_driven(folder) for _, folder in sweep.folders()):
        time.sleep(0.1)


def rows_of(sweep: Sweep) -> Iterator[Row]:
    """Every job that was planned, and every one that has a folder."""
    found = {
        num: read_json(folder / RESULT_FILE) or read_json(folder / REUSED_FILE)
        for num, folder in sweep.folders()
    }
    overrides = {job.num: job.overrides for job in sweep.jobs or []}
    for num in sorted(found.keys() | overrides.keys()):
        yield num, overrides.get(num) or overrides_in(sweep, num), found.get(num)


def overrides_in(sweep: Sweep, num: int) -> list[str]:
    """As Hydra stored them, for jobs that another sweeper chose."""
    try:
        lines = (sweep.folder / str(num) / ".hydra" / "overrides.yaml").read_text().splitlines()
    except OSError:
        return []
    return [line.removeprefix("- ") for line in lines if line.startswith("- ")]


def exit_code(rows: list[Row], *, interrupted: bool) -> int:
    """0: every job ended well; 130: interrupted; 2: no job could run at all; 1: a job failed, was refused, or did not run."""
    if interrupted or any(row_interrupted(document) for _, _, document in rows):
        return INTERRUPTED
    if all(ended_well(document) for _, _, document in rows):
        return 0
    return (
        2
        if all(document is not None and document["status"] == "refused" for _, _, document in rows)
        else 1
    )


def row_interrupted(document: Json | None) -> bool:
    """Whether this job was ended by Ctrl-C."""
    return document is not None and document.get("ended_by") == EndedBy.INTERRUPTED


def document(rows: list[Row], status: str) -> Json:
    """What format=json prints of a sweep: the jobs' own documents, in their order."""
    jobs = [
        {"num": num, "overrides": overrides, **(found or {"status": "not_run"})}
        for num, overrides, found in rows
    ]
    return {"status": status, "jobs": jobs}


def print_how_to_go_on(
    sweep: Sweep, rows: list[Row], terminal: Terminal, *, interrupted: bool
) -> None:
    """The command that runs what is missing, and nothing that is there."""
    missing = sum(not ended_well(found) for _, _, found in rows)
    if missing:
        what = (
            "interrupted"
            if interrupted
            else (sweep.stopped() == "fail_fast" and "stopped at the first failure") or "ended"
        )
        terminal.note(
            f"{what} with {missing} of {len(rows)} jobs not done. To run those, and only those: {sweep.command}"
        )
    terminal.note(f"sweep folder {sweep.folder}")
