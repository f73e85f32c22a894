"""Report how many tensors of a checkpoint are in the model, while transformers loads them."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from transformers.utils import logging

from zinfer.job.events import EventLog

REPORT_S = 0.5
"""Between two reports: a checkpoint has thousands of tensors."""
LOADING = "Loading weights"
"""Name that transformers gives the progress bar of its loading (core_model_loading.py)."""


class TensorCount:
    """Counts tensors, and reports them now and then."""

    def __init__(self, events: EventLog, total: int) -> None:
        self._events, self._total = events, total
        self._done, self._reported_s = 0, time.monotonic()

    def one_more(self) -> None:
        """Count a tensor that was read."""
        self._done += 1
        now_s = time.monotonic()
        if now_s - self._reported_s >= REPORT_S or self._done == self._total:
            self._reported_s = now_s
            self._events.progress(min(self._done, self._total), self._total, "tensors")

    def each_of(self, items: Any) -> Iterator[Any]:
        """Yield the items; each is counted when the next one is asked for."""
        for item in items:
            yield item
            self.one_more()


@contextmanager
def loading_reported(events: EventLog) -> Iterator[None]:
    """Report what transformers loads in this block, in place of its own progress bar.

    ZeRO-3 models are filled another way; their tensors are counted where samples are taken.
    """

    def bar(factory: Any, positional: tuple[Any, ...], named: dict[str, Any]) -> Any:
        if named.get("desc") != LOADING or not positional:
            return factory(*positional, **named)
        items = list(positional[0])
        return TensorCount(events, len(items)).each_of(items)

    before = logging.set_tqdm_hook(bar)
    try:
        yield
    finally:
        logging.set_tqdm_hook(before)
