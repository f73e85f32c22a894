"""Time a fixed piece of work between generations, to see whether the machine itself was slower.

Two virtual processors of one core, heat and power saving slow everything down by up to a half, for
seconds or minutes, and no counter of the system shows it. Imported in workers only.
"""

from __future__ import annotations

import time

import torch

LOOPS = 60_000
PRODUCTS = 20
ROWS, INNER, COLUMNS = 16, 512, 1408
"""A matrix of 2.9 MB: it stays in the processor's caches, and hardly counts in a run's memory."""


class Yardstick:
    """About 10 ms of work: half Python and half products, as in a small model's decode step."""

    def __init__(self) -> None:
        self._inputs, self._weights = torch.ones(ROWS, INNER), torch.ones(INNER, COLUMNS)
        self.seconds()

    def seconds(self) -> float:
        """Do the work once and return how long it took."""
        started_s = time.perf_counter()
        seen = {}
        for index in range(LOOPS):
            seen[index & 255] = index
        for _ in range(PRODUCTS):
            torch.mm(self._inputs, self._weights)
        return time.perf_counter() - started_s
