"""A fixed piece of work for the host's processor, timed between generations: whether the machine itself was slower while a run was timed.

Two virtual processors of one core, heat and power saving slow everything down by up to a half for seconds or minutes, and no counter of the
system shows it. Imported in workers only.
"""

from __future__ import annotations

import time

import torch

LOOPS = 60_000
PRODUCTS = 20
ROWS, INNER, COLUMNS = 16, 512, 1408
"""A matrix of 2.9 MB: it stays in the processor's caches and adds next to nothing to the memory that a run is measured by."""


class Yardstick:
    """About 10 ms of work, half of it Python's and half of it products, as in a decode step of a small model."""

    def __init__(self) -> None:
        self._inputs, self._weights = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS)
        self.seconds()

    def seconds(self) -> float:
        """Of one go, now."""
        started_s = time.perf_counter()
        seen = {}
        for index in range(LOOPS):
            seen[index & 255] = index
        for _ in range(PRODUCTS):
            torch.mm(self._inputs, self._weights)
        return time.perf_counter() - started_s
