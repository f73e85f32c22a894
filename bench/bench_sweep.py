"""Measure what a sweep costs beside its measurements.

That is: seconds a job, seconds when everything is reused, the driver's share of a core.

    python bench/bench_sweep.py [REPEATS]

Six jobs of a 2-layer LLaMA (16 prompt tokens, 8 new, 3 repeats, memory measured): three offload
targets in two types. The machine should be quiet. The driver's share is of a longer job, from its
first warm-up to its end, when the driver only watches.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import pairwise
from pathlib import Path

MODEL = (
    "model=tiny-llama",
    "model.overrides.num_hidden_layers=2",
    "launcher.omp_threads=1",
    "hardware.accelerator=cpu",
)
SWEEP = (
    *MODEL,
    "offload=none,cpu,nvme",
    "dtype=float32,bfloat16",
    "batch.prompt_tokens=16",
    "batch.new_tokens=8",
    "batch.repeats=3",
)
LONG_JOB = (
    *MODEL,
    "dtype=float32",
    "batch.prompt_tokens=16",
    "batch.new_tokens=64",
    "batch.repeats=20",
    "tracking=none",
)
CLOCK_TICKS_PER_S = os.sysconf("SC_CLK_TCK")


def zinfer(folder: Path, *arguments: str) -> tuple[float, str]:
    """Run zinfer; return wall seconds and stdout."""
    started_s = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *arguments, "format=json"],
        cwd=folder,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        sys.exit(done.stderr)
    return time.monotonic() - started_s, done.stdout


def sweep_times(folder: Path, *settings: str) -> tuple[float, list[float], float]:
    """Return the seconds in all, those of each job after the first, and those when run again."""
    total_s, out = zinfer(folder, "-m", *SWEEP, *settings)
    jobs = json.loads(out)["jobs"]
    assert all("peak_host_rss_bytes" in job["metrics"] for job in jobs)
    ends_s = [(Path(job["job_dir"]) / "result.json").stat().st_mtime for job in jobs]
    again_s, out = zinfer(folder, "-m", *SWEEP, *settings)
    assert all(job["reused"] for job in json.loads(out)["jobs"])
    return total_s, [after - before for before, after in pairwise(ends_s)], again_s


def started(folder: Path) -> subprocess.Popen[bytes]:
    """Start the driver of one long job."""
    return subprocess.Popen(
        [sys.executable, "-m", "zinfer", *LONG_JOB],
        cwd=folder,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )


def has_event(folder: Path, word: str) -> bool:
    """Tell if the job's worker has written an event with this word."""
    return any(f'"{word}"' in path.read_text() for path in folder.rglob("events.jsonl"))


def driver_share(folder: Path) -> tuple[float, float]:
    """Return the driver's CPU time over wall time while its worker generates, and the wall time."""
    driver = started(folder)
    while not has_event(folder, "warm-up"):
        time.sleep(0.05)
    cpu_s, started_s = cpu_seconds(driver.pid), time.monotonic()
    last_cpu_s, last_s = cpu_s, started_s
    while not has_event(folder, "result"):
        last_cpu_s, last_s = cpu_seconds(driver.pid), time.monotonic()
        time.sleep(0.05)
    driver.wait()
    return (last_cpu_s - cpu_s) / (last_s - started_s), last_s - started_s


def interruption_s(folder: Path) -> float:
    """Return the wall seconds from Ctrl-C, in the middle of a job, to the end of the driver."""
    driver = started(folder)
    while not has_event(folder, "sample"):
        time.sleep(0.05)
    started_s = time.monotonic()
    driver.send_signal(signal.SIGINT)
    driver.wait()
    return time.monotonic() - started_s


def cpu_seconds(pid: int) -> float:
    """Return user and system time. Source: proc(5), fields 14 and 15 of /proc/PID/stat."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS_PER_S


def main(repeats: int) -> None:
    """Print a table in Markdown."""
    forked, fresh = [], []
    for _ in range(repeats):  # alternating: what disturbs one disturbs the other
        with tempfile.TemporaryDirectory() as folder:
            forked.append(sweep_times(Path(folder)))
        with tempfile.TemporaryDirectory() as folder:
            fresh.append(sweep_times(Path(folder), "launcher.fork_workers=false"))
    with tempfile.TemporaryDirectory() as folder:
        share, share_s = driver_share(Path(folder))
    interruptions_s = []
    for _ in range(repeats):
        with tempfile.TemporaryDirectory() as folder:
            interruptions_s.append(interruption_s(Path(folder)))
    print(
        f"| median of {repeats} sweeps of six jobs | workers forked (default) "
        "| a fresh process for each job | target |"
    )
    print("| --- | --- | --- | --- |")
    rows = (
        (
            "seconds a job after the first, worst of five",
            [max(times) for _, times, _ in forked],
            [max(times) for _, times, _ in fresh],
            "3",
        ),
        (
            "the whole sweep, s",
            [total for total, _, _ in forked],
            [total for total, _, _ in fresh],
            "",
        ),
        (
            "the same sweep again, everything reused, s",
            [again for _, _, again in forked],
            [again for _, _, again in fresh],
            "3",
        ),
    )
    for name, ours, other, target in rows:
        print(
            f"| {name} | {statistics.median(ours):.2f} | {statistics.median(other):.2f} "
            f"| {target} |"
        )
    print(
        f"| driver's CPU while a worker generates ({share_s:.0f} s), % of a core "
        f"| {100 * share:.2f} | | 3 |"
    )
    print(f"| a job ends after Ctrl-C, s | {statistics.median(interruptions_s):.2f} | | 5 |")


if __name__ == "__main__":
    main(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
