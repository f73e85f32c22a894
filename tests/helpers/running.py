"""Run zinfer as a user does and read back what it left."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any


def results(folder: Path, *overrides: str, timeout_s: float = 500) -> list[dict[str, Any]]:
    """Run a sweep through the command line; return each job's result, in the order of the jobs.

    The command may end badly: a job's status says so.
    """
    command = [sys.executable, "-m", "zinfer", "-m", f"hydra.sweep.dir={folder}", *overrides]
    done = subprocess.run(
        command, cwd=folder.parent, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    jobs = sorted(folder.glob("*/result.json"), key=lambda path: int(path.parent.name))
    assert jobs, done.stdout[-2000:] + done.stderr[-4000:]
    return [{"problems": None, **json.loads(path.read_text())} for path in jobs]
