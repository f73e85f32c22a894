"""Tell a process from a later one with the same number, on this machine."""

from __future__ import annotations

from pathlib import Path


def process_start_ticks(pid: int) -> int | None:
    """Return a process's start in clock ticks since boot, or None when there is no such process.

    With the pid it identifies the process. Source: proc(5), field 22 of /proc/PID/stat.
    """
    fields = stat_fields(pid)
    return None if fields is None or fields[0] in ("Z", "X") else int(fields[19])


def stat_fields(pid: int) -> list[str] | None:
    """Return /proc/PID/stat from its third field, the state, on. None when there is no process."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except OSError:
        return None
    return stat.rpartition(")")[2].split()


def is_alive(pid: int, start_ticks: int | None) -> bool:
    """Check that this very process still runs."""
    now = process_start_ticks(pid)
    return now is not None and (start_ticks is None or now == start_ticks)
