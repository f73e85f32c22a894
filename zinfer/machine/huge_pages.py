"""Put memory that a disk is read into huge pages: a few long pieces, not thousands of pages.

O_DIRECT reads go to physical pages, and a device takes a limited number of pieces at once. Which
pages a buffer gets depends on what ran before. So the same read of the same file is fast in one
process and half as fast in the next. Measured in docs/benchmarks.md.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Iterator
from pathlib import Path

MADV_COLLAPSE = 25
"""Advice for Linux 6.1 and later, whatever transparent_hugepage/enabled says.

Older kernels refuse it. Source: madvise(2).
"""
SIZE_FILE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")


def huge_page_bytes() -> int | None:
    """Return the bytes of one huge page; None where the kernel has none."""
    try:
        return int(SIZE_FILE.read_text())
    except (OSError, ValueError):
        return None


def into_huge_pages(
    address: int, size: int, wanted: Iterable[tuple[int, int]] | None = None
) -> int:
    """Move touched memory into huge pages where it lies; contents stay.

    Args:
        address: of the memory. First and last pieces that are no whole huge page stay as they are.
        size: its bytes.
        wanted: (offset, bytes) of the parts that matter, in order; None: all of it.

    Returns:
        Bytes that are in huge pages now: 0 where the kernel cannot, fewer than wanted where it
        found too few free ones.
    """
    page = huge_page_bytes()
    if page is None:
        return 0
    madvise = ctypes.CDLL(None, use_errno=True).madvise
    return sum(
        end - start
        for start, end in whole_pages(
            address, size, wanted if wanted is not None else [(0, size)], page
        )
        if madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), MADV_COLLAPSE) == 0
    )


def whole_pages(
    address: int, size: int, wanted: Iterable[tuple[int, int]], page: int
) -> Iterator[tuple[int, int]]:
    """List (start, end) addresses of the huge pages that the wanted parts touch, each once.

    None of them reaches beyond the memory.
    """
    done, last = -(-address // page) * page, (address + size) // page * page
    for offset, length in wanted:
        start = max(done, (address + offset) // page * page)
        end = min(last, -(-(address + offset + length) // page) * page)
        if start < end:
            yield start, end
            done = end
