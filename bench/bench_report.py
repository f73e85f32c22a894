"""Measure a report over 1,000 runs: seconds, memory, size of its page. `make bench-report`.

The runs are invented, the store is real.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RUNS = 1000
MAKE_STORE = Path(__file__).parent.parent / "tests/helpers/synthetic_store.py"


def main() -> None:
    """Print a table in Markdown."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, str(MAKE_STORE), folder, str(RUNS)],
            check=True,
            stdout=subprocess.DEVNULL,
        )
        made = resource.getrusage(resource.RUSAGE_CHILDREN)
        out, started_s = Path(folder) / "report", time.perf_counter()
        command = [
            sys.executable,
            "-m",
            "multirun_analysis",
            "--uri",
            f"sqlite:///{folder}/mlflow.db",
            "--out",
            str(out),
        ]
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        wall_s, used = time.perf_counter() - started_s, resource.getrusage(resource.RUSAGE_CHILDREN)
        page_bytes = (out / "report.html").stat().st_size
    cpu_s = used.ru_utime + used.ru_stime - made.ru_utime - made.ru_stime
    print(f"| a report over {RUNS:,} runs | | goal |")
    print("| --- | --- | --- |")
    print(f"| processor time (wall time) | {cpu_s:.1f} s ({wall_s:.1f} s) | 30 s |")
    print(f"| peak memory | {used.ru_maxrss * 1024 / 1e6:.0f} MB | 1,000 MB |")
    print(f"| report.html | {page_bytes / 1e6:.2f} MB | 8 MB |")


if __name__ == "__main__":
    main()
