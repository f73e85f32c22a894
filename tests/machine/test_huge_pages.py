"""Memory that a disk is read into lies in huge pages: the right pieces, with what they held."""

from __future__ import annotations

import ctypes
import mmap
import os
import re
from pathlib import Path

import pytest

from tests.helpers.sweeping import TINY, document, run
from zinfer.machine.huge_pages import huge_page_bytes, into_huge_pages, whole_pages

PIECES = [  # address, size, wanted, (start, end) of each piece: pages of 100 bytes
    (0, 500, [(0, 500)], [(0, 500)]),
    (30, 500, [(0, 500)], [(100, 500)]),  # the ends are no whole pages
    (0, 1000, [(0, 10), (500, 10)], [(0, 100), (500, 600)]),  # the beginning of two buffers
    (
        0,
        1000,
        [(250, 100), (350, 100)],
        [(200, 400), (400, 500)],
    ),  # a page that two parts share, once
    (0, 1000, [(210, 20), (240, 20)], [(200, 300)]),
    (30, 60, [(0, 60)], []),
    (50, 450, [(400, 50)], [(400, 500)]),
]


@pytest.mark.parametrize(("address", "size", "wanted", "expected"), PIECES)
def test_whole_pages_of_what_is_wanted_and_nothing_beyond(
    address: int, size: int, wanted: list[tuple[int, int]], expected: list[tuple[int, int]]
) -> None:
    assert list(whole_pages(address, size, wanted, 100)) == expected


def anonymous_huge_bytes(address: int) -> int:
    """Return the bytes of the mapping that has this address, by the kernel's own account."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= address < int(bounds[2], 16)
        elif inside and line.startswith("AnonHugePages:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.fixture
def memory() -> tuple[mmap.mmap, int]:
    """Map eight huge pages and a little, every small page touched and different."""
    page = huge_page_bytes()
    if page is None:
        pytest.skip("needs a kernel with transparent huge pages")
    held = mmap.mmap(-1, 9 * page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for offset in range(0, len(held), mmap.PAGESIZE):
        held[offset : offset + 8] = offset.to_bytes(8, "little")
    address = ctypes.addressof(ctypes.c_char.from_buffer(held))
    if tuple(map(int, re.findall(r"\d+", os.uname().release)[:2])) < (6, 1):
        pytest.skip("needs Linux 6.1 for MADV_COLLAPSE")
    return held, address


def test_touched_memory_moves_into_huge_pages_with_what_it_held(
    memory: tuple[mmap.mmap, int],
) -> None:
    held, address = memory
    page = huge_page_bytes() or 0
    before = anonymous_huge_bytes(address)
    moved = into_huge_pages(address, len(held))
    assert moved >= 8 * page
    assert (
        anonymous_huge_bytes(address) >= before + moved - page
    )  # a mapping beside it may be one with it
    assert all(
        held[offset : offset + 8] == offset.to_bytes(8, "little")
        for offset in range(0, len(held), mmap.PAGESIZE)
    )


def test_a_kernel_without_huge_pages_leaves_memory_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("zinfer.machine.huge_pages.SIZE_FILE", tmp_path / "absent")
    assert into_huge_pages(0, 1 << 30) == 0


SWAPPED = (
    "offload=nvme",
    "model.overrides.hidden_size=512",
    "model.overrides.intermediate_size=1408",
)
"""Matrices of 1 MiB and more, which are swapped."""


@pytest.mark.slow
def test_staging_buffers_of_a_run_lie_in_huge_pages_unless_it_is_told_not_to(
    memory: tuple[mmap.mmap, int], tmp_path: Path, built_ops: list[str]
) -> None:
    sweep = run(
        tmp_path,
        "-m",
        *TINY,
        *SWAPPED,
        "offload.huge_pages=true,false,null",
        "tracking=none",
        "format=json",
    )
    assert sweep.returncode == 0, sweep.stderr
    on, off, default = document(sweep)["jobs"]
    offload = on["deepspeed"]["zero_optimization"]["offload_param"]
    assert (
        on["metrics"]["huge_page_bytes"] - off["metrics"]["huge_page_bytes"]
        > 0.5 * offload["buffer_count"] * offload["buffer_size"] * 4
    )
    assert default["metrics"]["huge_page_bytes"] == pytest.approx(
        on["metrics"]["huge_page_bytes"], rel=0.2
    )
    assert on["generated"]["token_ids"] == off["generated"]["token_ids"]
    assert on["metrics"]["mlocked_bytes"] == off["metrics"]["mlocked_bytes"]
