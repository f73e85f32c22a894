"""Decision of the head of a sweep: refuse it, find it all done already, or run its jobs.

Hydra calls the head from a callback, drops what a callback returns, and turns its exceptions into
warnings. So the decision is left in a context variable, and a sweep with nothing left to run
leaves Hydra by an exception that is no `Exception`.
"""

from __future__ import annotations

from contextlib import ExitStack
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from zinfer.job.outcome import Outcome
    from zinfer.sweep.board import Board
    from zinfer.sweep.record import Sweep
    from zinfer.tracking.parent import ParentRunCallback


@dataclass(frozen=True, kw_only=True)
class NoSweep:
    """No job can run, and none is to: the sweep was refused, or its head failed."""

    outcome: Outcome
    output_format: str


@dataclass(frozen=True, kw_only=True)
class Planned:
    """The plans of a grid were made and shown by the head itself."""

    exit_code: int


@dataclass(frozen=True, kw_only=True)
class Previewed:
    """The jobs are only to be shown."""

    sweep: Sweep


@dataclass(frozen=True, kw_only=True)
class Started:
    """The sweep's jobs are Hydra's to run now."""

    sweep: Sweep
    parent: ParentRunCallback
    """The sweep's own run in MLflow."""
    held: ExitStack
    """Holds the sweep's folder until this process ends."""
    board: Board | None
    """Draws the jobs where they run in other processes; None: each draws itself, or nobody."""
    left: int | None
    """Jobs that are not reused; None where the jobs are not known beforehand."""


Decision = NoSweep | Planned | Previewed | Started

DECIDED: ContextVar[Decision | None] = ContextVar("decided", default=None)
"""The decision of this process's head; None in a single run, and before the head was called."""


class LeaveHydra(BaseException):
    """Nothing is left to run. Leaves Hydra before it composes the jobs again."""
