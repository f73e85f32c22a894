"""The line above a benchmark's tables: what was measured, and on which processor."""

from __future__ import annotations

import subprocess
from pathlib import Path

from zinfer import __version__
from zinfer.machine.processor import cpu_model_name


def heading(*more: str) -> str:
    """Return `zinfer VERSION, commit COMMIT, PROCESSOR`, and what else the benchmark names."""
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"],
        cwd=Path(__file__).parent,
        capture_output=True,
        text=True,
        check=False,
    ).stdout.strip()
    return ", ".join(
        [f"zinfer {__version__}", f"commit {commit or 'unknown'}", f"{cpu_model_name()}", *more]
    )
