"""Run the job of one folder: `python -m zinfer.worker JOB_DIR`."""

from __future__ import annotations

import os
import sys
from pathlib import Path

from zinfer.worker.run import main

if __name__ == "__main__":
    code = main(Path(sys.argv[1]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # tearing down torch, gloo and aio threads takes seconds and can crash after a good result
