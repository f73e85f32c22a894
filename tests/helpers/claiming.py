"""A process that owns a swap folder, and says so with a line, until it is ended."""

from __future__ import annotations

ID = "0123456789abcdef"
CLAIM = """
import sys, time
from pathlib import Path
from zinfer.job.swap import claimed_swap_folder
with claimed_swap_folder(sys.argv[1], sys.argv[2], Path("job")) as folder:
    (folder / "weights.bin").write_bytes(bytes(4096))
    print(1, flush=True)
    time.sleep(60)
"""
"""Code for `python -c CLAIM PATH ID`."""
