"""Look at the machine around a run: who else uses its processors, and how fast they may be.

One look before the timed generations and one after them; only their difference says something.
Everything that this kernel does not show is None.
"""

from __future__ import annotations

import os
import resource
import statistics
import time
from dataclasses import dataclass
from pathlib import Path

from zinfer.job.files import ATTEMPT_VARIABLE
from zinfer.job.folder import other_jobs_at_work
from zinfer.machine.cgroups import cgroup_folders
from zinfer.machine.reading import ROOT

TICKS_PER_S = os.sysconf("SC_CLK_TCK")
BUSY = (1, 2, 3, 8)
"""Columns of a cpu line of /proc/stat: user, nice, system, steal.

Source: proc(5). Guests are counted in user and nice already. Interrupts are left out: they mostly
serve this run's own disk and link.
"""
STEAL = 8
"""Time in which the hypervisor ran someone else on this virtual processor."""


@dataclass(frozen=True, kw_only=True)
class Look:
    """The counters of one moment."""

    time_s: float
    cores: int
    """Processors that this process may use; the counters below are of these only."""
    busy_s: float | None
    """Processor seconds of all processes since the machine started, steal included."""
    steal_s: float | None
    own_s: float
    """Processor seconds of this process."""
    load_average: float | None
    """Processes that ran or waited, mean of the last minute, of the whole machine."""
    machine_cores: int
    frequency_hz: float | None
    throttle_events: int | None
    """How often heat slowed a core down."""
    other_jobs: int
    """Other jobs of zinfer that have a worker on this machine."""
    cgroup_throttled_s: float | None
    """How long a limit on this container's processor time has held it back."""


@dataclass(frozen=True, kw_only=True)
class Surroundings:
    """Changes on the machine between two looks. None: not known."""

    seconds: float
    cores: int
    machine_cores: int
    others_cores: float | None
    """Processors that other processes kept busy, on average."""
    steal_share: float | None
    """Share of the processors' time that the hypervisor gave to others."""
    load_before: float | None
    load_after: float | None
    slowest_frequency_share: float | None
    """Frequency at the slower of both looks over that at the faster."""
    throttle_events: int | None
    cgroup_throttled_share: float | None
    other_jobs: int = 0
    """Other jobs of zinfer that worked on this machine at one of both looks."""


def look(root: Path = ROOT) -> Look:
    """Read all counters; a tenth of a millisecond for each core."""
    cores = sorted(os.sched_getaffinity(0))
    rows = _cpu_rows(root, cores)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return Look(
        time_s=time.monotonic(),
        cores=len(cores),
        busy_s=sum(row[column] for row in rows for column in BUSY) / TICKS_PER_S if rows else None,
        steal_s=sum(row[STEAL] for row in rows) / TICKS_PER_S if rows else None,
        own_s=own.ru_utime + own.ru_stime,
        load_average=_number(root / "proc/loadavg"),
        machine_cores=os.cpu_count() or len(cores),
        frequency_hz=_frequency_hz(root, cores),
        throttle_events=_throttle_events(root, cores),
        other_jobs=other_jobs_at_work(os.environ.get(ATTEMPT_VARIABLE)),
        cgroup_throttled_s=_cgroup_throttled_s(root),
    )


def between(before: Look, after: Look, ranks: int = 1) -> Surroundings:
    """Return what happened between two looks.

    Args:
        ranks: processes of this run on this host; they use as much as this one does.
    """
    seconds = max(after.time_s - before.time_s, 1e-9)
    others = None
    if before.busy_s is not None and after.busy_s is not None:
        own = ranks * (after.own_s - before.own_s)
        others = max(0.0, after.busy_s - before.busy_s - own) / seconds
    steal = _difference(before.steal_s, after.steal_s)
    throttled = _difference(before.cgroup_throttled_s, after.cgroup_throttled_s)
    events = _difference(before.throttle_events, after.throttle_events)
    frequencies = [before.frequency_hz, after.frequency_hz]
    known = [each for each in frequencies if each]
    return Surroundings(
        seconds=seconds,
        cores=after.cores,
        machine_cores=after.machine_cores,
        others_cores=others,
        steal_share=None if steal is None else steal / seconds / after.cores,
        load_before=before.load_average,
        load_after=after.load_average,
        slowest_frequency_share=min(known) / max(known) if len(known) == 2 else None,
        throttle_events=None if events is None else int(events),
        other_jobs=max(before.other_jobs, after.other_jobs),
        cgroup_throttled_share=None if throttled is None else throttled / seconds,
    )


def _difference(before: float | None, after: float | None) -> float | None:
    return None if before is None or after is None else after - before


def _cpu_rows(root: Path, cores: list[int]) -> list[list[int]]:
    """Return the counters of these processors, each row with its name's place kept free."""
    wanted = {f"cpu{core}" for core in cores}
    try:
        lines = (root / "proc/stat").read_text().splitlines()
    except OSError:
        return []
    rows = [line.split() for line in lines]
    return [[0, *map(int, row[1:])] for row in rows if row and row[0] in wanted and len(row) > 8]


def _frequency_hz(root: Path, cores: list[int]) -> float | None:
    """Return the mean speed of the processors now. Source: cpufreq's scaling_cur_freq, kHz."""
    folder = root / "sys/devices/system/cpu"
    found = [_number(folder / f"cpu{core}/cpufreq/scaling_cur_freq") for core in cores]
    known = [each for each in found if each is not None]
    return statistics.fmean(known) * 1000 if known else None


def _throttle_events(root: Path, cores: list[int]) -> int | None:
    """Return the sum of thermal_throttle/core_throttle_count; Intel's processors have it."""
    folder = root / "sys/devices/system/cpu"
    found = [_number(folder / f"cpu{core}/thermal_throttle/core_throttle_count") for core in cores]
    known = [each for each in found if each is not None]
    return int(sum(known)) if known else None


def _cgroup_throttled_s(root: Path) -> float | None:
    """Return throttled_usec (v2) or throttled_time (v1, nanoseconds) of this process's cgroup."""
    for folder in cgroup_folders("cpu", root):
        try:
            lines = (folder / "cpu.stat").read_text().splitlines()
        except OSError:
            continue
        for line in lines:
            name, _, value = line.partition(" ")
            if name == "throttled_usec":
                return int(value) / 1e6
            if name == "throttled_time":
                return int(value) / 1e9
    return None


def _number(path: Path) -> float | None:
    """Return the first number of a file."""
    try:
        return float(path.read_text().split()[0])
    except (OSError, ValueError, IndexError):
        return None
