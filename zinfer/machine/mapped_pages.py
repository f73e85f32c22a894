"""Pages of library files that a process has touched, and their return in a forked copy of it.

fork() leaves pages of mapped files out of the child until it touches them. A worker forked from a
prepared server would count some 130 MB less resident memory than a fresh one that does the same,
and would pay for the page faults while it loads its model.
"""

from __future__ import annotations

import array
import ctypes
import mmap
import os
from collections.abc import Iterator
from itertools import groupby

MADV_POPULATE_READ = 22
"""Linux 5.14 and later; older kernels refuse it, and the pages come when they are touched."""
PRESENT = 1 << 63
"""Bit of an entry in /proc/self/pagemap, 8 bytes for each page.

Source: Documentation/admin-guide/mm/pagemap.rst.
"""


def touched_file_ranges() -> list[tuple[int, int]]:
    """List (address, bytes) of every run of mapped files' pages in this page table."""
    ranges = []
    with open("/proc/self/pagemap", "rb", buffering=0) as pagemap:
        for start, end in _file_mappings():
            entries = array.array("Q")
            entries.frombytes(
                os.pread(
                    pagemap.fileno(), (end - start) // mmap.PAGESIZE * 8, start // mmap.PAGESIZE * 8
                )
            )
            address = start
            for is_present, run in groupby(entries, key=lambda entry: bool(entry & PRESENT)):
                length = sum(1 for _ in run) * mmap.PAGESIZE
                if is_present:
                    ranges.append((address, length))
                address += length
    return ranges


def _file_mappings() -> Iterator[tuple[int, int]]:
    """List first and last address of every mapping of a file.

    Source: proc(5), maps: `start-end perms offset device inode path`.
    """
    with open("/proc/self/maps") as maps:
        for line in maps:
            addresses, _, _, _, inode, *_ = line.split()
            if inode != "0":
                start, _, end = addresses.partition("-")
                yield int(start, 16), int(end, 16)


def touch(ranges: list[tuple[int, int]]) -> None:
    """Enter these pages into this process's page table."""
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    for address, length in ranges:
        madvise(ctypes.c_void_p(address), ctypes.c_size_t(length), MADV_POPULATE_READ)
