"""Verdict on a run's numbers: can they be trusted? It travels from the worker to the store.

The model is pyperf's "the benchmark result may be unstable", with its required number of processes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any, Literal

Verdict = Literal["stable", "noisy", "disturbed"]


@dataclass(frozen=True, kw_only=True)
class Stability:
    """The verdict on one run, with its reasons."""

    verdict: Verdict
    """stable: the spread is small for the number of repeats. noisy: it is too large.
    disturbed: something outside the run took part, so its numbers are of another machine."""
    reasons: tuple[str, ...] = ()
    """One sentence each, with numbers; none for stable."""
    repeats_needed: int | None = None
    """Repeats after which the median would be known well enough; None where enough were made."""

    def document(self) -> dict[str, Any]:
        """Return the JSON that the `result` event carries."""
        return {**asdict(self), "reasons": list(self.reasons)}
