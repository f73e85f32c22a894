"""Follow a job by its events: the phase that runs, its share that is done, and its time left.

Nothing here writes to a terminal: `frames` draws it, and `phase_line` says it in a log.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from zinfer.config import RunConfig
from zinfer.config.tasks import task_of
from zinfer.job.events import Event
from zinfer.units import counted, format_bytes, format_left, format_roughly

START, LOG = "start", "log"
"""Phases that the driver itself reports: the worker's start, and the run's end in MLflow."""
WORDS = {
    START: "start worker",
    "load": "load weights",
    "verify": "verify weights",
    "warm-up": "warm up",
    "profile": "trace one step",
    "quality": "score the text",
    LOG: "log to MLflow",
}
"""Phase, as events name it -> how people are told. Others are shown as they are."""
LEAST_SHARE, LEAST_S = 0.01, 1.0
"""Earlier than this, a rate says nothing about the rest of a phase."""


@dataclass
class Phase:
    """One phase of a job, and how far it is."""

    name: str
    started_s: float
    """Seconds since the epoch, as all times here."""
    ended_s: float | None = None
    done: float = 0.0
    total: float | None = None
    """None where nobody knows how much there is to do."""
    unit: str = ""
    reported_s: float = 0.0
    """When `done` was reported."""
    generations: int = 0
    new_tokens: int = 0
    """Of each row in one generation."""
    finished: int = 0
    """Generations of this phase that are over."""
    generation_began_s: float = 0.0
    """When the generation that runs began."""

    @property
    def words(self) -> str:
        """Name it for people."""
        return WORDS.get(self.name, self.name)

    @property
    def share(self) -> float | None:
        """Return the part that is done, 0 to 1; None where it is not known."""
        return min(1.0, self.done / self.total) if self.total else None

    @property
    def count(self) -> str:
        """Say what is done of how much: '1.2 GiB of 2.5 GiB', '35 of 96 tokens'."""
        if self.total is None:
            return ""
        if self.unit == "bytes":
            return f"{format_bytes(self.done)} of {format_bytes(self.total)}"
        if self.total >= 1e7:
            return f"{self.done / 1e6:.0f} of {self.total / 1e6:.0f} million {self.unit}"
        return f"{self.done:.0f} of {self.total:.0f} {self.unit}"

    def elapsed_s(self, now_s: float) -> float:
        """Return how long it took, or takes so far."""
        return max(0.0, (now_s if self.ended_s is None else self.ended_s) - self.started_s)

    def left_at_this_rate_s(self, now_s: float) -> float | None:
        """Return the seconds left if the rest goes as fast as what is done; None: not known."""
        share, took_s = self.share, self.reported_s - self.started_s
        if share is None or share < LEAST_SHARE or share >= 1.0 or took_s < LEAST_S:
            return None
        return max(0.0, took_s * (1.0 - share) / share - (now_s - self.reported_s))


class JobProgress:
    """The phases of one job, from its events."""

    def __init__(self, label: str = "", coming: Sequence[str] = ()) -> None:
        self.label = label
        self.phases: list[Phase] = []
        self._coming = tuple(coming)
        self._generation_s: list[float] = []
        self._predicted_s: tuple[float, float] | None = None

    @property
    def current(self) -> Phase | None:
        """Return the phase that runs, or ran last."""
        return self.phases[-1] if self.phases else None

    @property
    def coming(self) -> tuple[str, ...]:
        """Return the names of the phases that are still to come."""
        reached = [self._coming.index(it.name) for it in self.phases if it.name in self._coming]
        return self._coming[max(reached, default=-1) + 1 :]

    def take(self, event: Event) -> None:
        """Learn from one more event."""
        match event["event"]:
            case "phase":
                self._begin(event)
            case "progress":
                self._report(event["time_s"], event["done"], event["total"], event["unit"])
            case "sample":
                self._sample(event)
            case "planned":
                self._predicted_s = _predicted(event["plan"])

    def _begin(self, event: Event) -> None:
        if self.current is not None:
            self.current.ended_s = event["time_s"]
        generations, new_tokens = _count(event, "generations"), _count(event, "new_tokens")
        bytes_to_load = _count(event, "weight_bytes")
        tokens = generations * new_tokens
        self.phases.append(
            Phase(
                name=event["name"],
                started_s=event["time_s"],
                reported_s=event["time_s"],
                generation_began_s=event["time_s"],
                total=tokens or bytes_to_load or None,
                unit="tokens" if tokens else "bytes" if bytes_to_load else "",
                generations=generations,
                new_tokens=new_tokens,
            )
        )

    def _report(self, time_s: float, done: float, total: float, unit: str) -> None:
        phase = self.current
        if phase is not None:
            phase.done, phase.total, phase.unit, phase.reported_s = done, total, unit, time_s

    def _sample(self, event: Event) -> None:
        """Take a finished generation: the best measure of those that follow."""
        self._generation_s.append(event["total_s"])
        phase = self.current
        if phase is not None and phase.new_tokens:
            phase.finished = event["index"] + 1
            phase.generations = max(phase.generations, phase.finished)
            phase.generation_began_s = event["time_s"]
            done, total = phase.finished * phase.new_tokens, phase.generations * phase.new_tokens
            self._report(event["time_s"], done, total, "tokens")

    def seconds_left(self, now_s: float) -> float | None:
        """Return the time left of the phase that runs; None where it is not known."""
        phase = self.current
        if phase is None or phase.ended_s is not None or phase.share == 1.0:
            return None
        each_s = self._generation_takes_s(phase)
        if each_s is None:
            return phase.left_at_this_rate_s(now_s)
        left_s = (phase.generations - phase.finished) * each_s
        return max(0.0, left_s - (now_s - phase.generation_began_s))

    def _generation_takes_s(self, phase: Phase) -> float | None:
        """Return the median of the job's own generations, else what its plan predicts."""
        if not phase.new_tokens:
            return None
        if self._generation_s:
            return statistics.median(self._generation_s)
        if self._predicted_s is None:
            return None
        prefill_s, step_s = self._predicted_s
        return prefill_s + (phase.new_tokens - 1) * step_s


def phase_line(label: str, phase: Phase, now_s: float, left_s: float | None) -> str:
    """Say in one line of a log what a job does: 'opt-125m: load weights, 1.2 GiB of 2.5 GiB'."""
    said = phase.words
    if phase.done:
        elapsed = format_roughly(phase.elapsed_s(now_s))
        said += f", {phase.share or 0:.0%} ({phase.count}) after {elapsed}"
    elif phase.generations:
        each = counted(phase.generations, "generation")
        said += f", {each} of {counted(phase.new_tokens, 'token')}"
    elif phase.unit == "bytes":
        said += f", {format_bytes(phase.total)}"
    if left_s is not None:
        said += f", {format_left(left_s)}"
    return f"{label}: {said}" if label else said


def coming_phases(config: RunConfig) -> tuple[str, ...]:
    """Return the phases that a job of this configuration goes through, in their order."""
    logs = (LOG,) if config.tracking.store != "none" else ()
    if not task_of(config).loads_model:
        return (START, "plan", *logs)
    optional = {
        "verify": config.weights == "pretrained",
        "warm-up": config.batch.warmup > 0,
        "generate": True,
        "profile": config.profile,
        "quality": config.quality.enabled,
    }
    chosen = (name for name, is_there in optional.items() if is_there)
    return (START, "plan", "import", "load", *chosen, *logs)


def _count(event: Event, name: str) -> int:
    """Return a number of an event; 0 where it has none."""
    value = event.get(name)
    return int(value) if isinstance(value, int | float) else 0


def _predicted(plan: dict[str, Any]) -> tuple[float, float] | None:
    """Return predicted seconds of the prefill and of a decode step; None: not calibrated."""
    prediction = plan.get("prediction")
    if not isinstance(prediction, dict):
        return None
    prefill_s = prediction.get("predicted_prefill_s")
    step_s = prediction.get("predicted_decode_step_s")
    if not isinstance(prefill_s, int | float) or not isinstance(step_s, int | float):
        return None
    return float(prefill_s), float(step_s)
