"""Run a model that is large enough to show where its weights are, on the machine's GPU."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

BATCH = (
    "batch.batch_size=2",
    "batch.prompt_tokens=16",
    "batch.new_tokens=24",
    "batch.warmup=1",
    "batch.repeats=2",
)
MODEL = (
    "model=tiny-llama",
    *(
        f"model.overrides.{name}={value}"
        for name, value in {
            "hidden_size": 1024,
            "intermediate_size": 4096,
            "num_hidden_layers": 8,
        }.items()
    ),
)


def zinfer(folder: Path, *overrides: str) -> dict[str, Any]:
    """Return one job's result."""
    command = [sys.executable, "-m", "zinfer", "format=json", "tracking=none", *overrides]
    done = subprocess.run(
        command, cwd=folder, capture_output=True, text=True, timeout=900, check=False
    )
    assert done.stdout, done.stderr
    result = json.loads(done.stdout)
    assert result["status"] == "ok", (result, done.stderr)
    assert isinstance(result, dict)
    return result
