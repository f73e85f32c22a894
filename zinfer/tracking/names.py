"""Names under which runs are logged in MLflow: run states, tags, metrics and parameters."""

from __future__ import annotations

from zinfer.job.outcome import Status

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
"""MLflow's own states of a run that has ended."""
RUN_STATUS: dict[Status, str] = {
    "ok": FINISHED,
    "planned": FINISHED,
    "killed": KILLED,
    "timeout": KILLED,
}


def run_status(status: Status) -> str:
    """Return MLflow's state for a job's status. The tag zinfer.status has the exact one."""
    return RUN_STATUS.get(status, FAILED)
