"""The job folder: what the driver leaves there for the worker, and what both leave for people."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from zinfer.config import RunConfig, config_to_tree
from zinfer.swap import process_start_ticks

JOB_FILE = "job.json"
RESULT_FILE = "result.json"
WORKER_LOG = "worker.log"
DRIVER_READY_FILE = "driver_ready"


def write_job(job_dir: Path, config: RunConfig) -> None:
    """Store the checked configuration, and which process is the driver."""
    pid = os.getpid()
    job = {"driver_pid": pid, "driver_start_ticks": process_start_ticks(pid), "config": config_to_tree(config)}
    (job_dir / JOB_FILE).write_text(json.dumps(job, indent=1))


def read_job_config(job_dir: Path) -> tuple[dict[str, Any], int, int | None]:
    """(configuration tree, the driver's pid, its start in clock ticks)."""
    job = json.loads((job_dir / JOB_FILE).read_text())
    return job["config"], job["driver_pid"], job["driver_start_ticks"]
