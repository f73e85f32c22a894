"""Find the batch size with the highest generated_tokens_per_s: sweep.search=best_batch.

Published rows are often the best of a batch sweep; this is that step. The batch doubles while
throughput rises. What runs out of memory or does not fit bounds it from above. Then the gap
between the best neighbours is bisected. Each trial is a job with a run of its own.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar

from zinfer.config import RunConfig
from zinfer.driver.finishing import finish
from zinfer.driver.interrupts import Interrupts
from zinfer.driver.refusals import refusal
from zinfer.driver.run import run_job
from zinfer.driver.terminal import Terminal
from zinfer.job.files import RESULT_FILE
from zinfer.job.outcome import Json, Outcome
from zinfer.job.records import read_result
from zinfer.sweep.record import Sweep
from zinfer.sweep.resume import note_reused, stands_now
from zinfer.tracking.deadline import never
from zinfer.tracking.job_key import key_here
from zinfer.tracking.parent import announce_parent, close_parent

if TYPE_CHECKING:
    from rich.console import RenderableType

    from zinfer.driver.progress import JobProgress

STILL_RISING = 1.02
"""A doubled batch that gives less than 2% more is no reason to double again."""
RESOLUTION = 0.125
"""Bisection ends when the next batch size differs from the best by less than an eighth."""
TOO_LARGE = ("oom_device", "oom_host", "does_not_fit")

Trial = Callable[[int], float | None]
"""Batch size -> tokens per second; None where it ran out of memory or does not fit."""


class SearchStopped(Exception):
    """A trial failed for another reason than memory, or the search was interrupted."""


def best_batch(
    trial: Trial, first: int, step: int, largest: int, trials: int
) -> dict[int, float | None]:
    """Return every batch size that was tried, with its throughput.

    Throughput rises with the batch, flattens, and ends where memory does. So the best batch lies
    beside the best of the powers of two.

    Args:
        trial: measures one batch size.
        step: all sizes are multiples of it (the ranks).
        trials: at most so many sizes are tried.
    """
    tried: dict[int, float | None] = {}

    def rate(size: int) -> float:
        if size not in tried:
            tried[size] = trial(size)
        return tried[size] or 0.0

    size = max(step, first)
    rate(size)
    while 2 * size <= largest and len(tried) < trials and rate(size) > 0:
        if rate(2 * size) < STILL_RISING * rate(size):
            break
        size *= 2
    while len(tried) < trials:
        best = max(tried, key=lambda tried_size: tried[tried_size] or 0.0)
        between = [_middle(best, neighbour, step) for neighbour in _neighbours(best, tried)]
        untried = [
            middle
            for middle in between
            if middle not in tried and abs(middle - best) >= max(step, RESOLUTION * best)
        ]
        if not untried or not tried[best]:
            break
        rate(untried[0])
    return tried


def _neighbours(best: int, tried: dict[int, float | None]) -> list[int]:
    """Return the nearest tried sizes on both sides, the faster one first.

    Where memory ended at the upper one, throughput was still rising: return that one alone.
    """
    below = max((size for size in tried if size < best), default=None)
    above = min((size for size in tried if size > best), default=None)
    if above is not None and tried[above] is None:
        return [above]
    return sorted(
        (size for size in (below, above) if size is not None),
        key=lambda size: tried[size] or 0.0,
        reverse=True,
    )


def _middle(one: int, other: int, step: int) -> int:
    return (one + other) // 2 // step * step


def search_best_batch(
    config: RunConfig, job_dir: Path, terminal: Terminal, sweep: Sweep | None = None
) -> Outcome:
    """Run the trials in folders b1, b2, b4 ... of the job; return the outcome of the best one."""
    parent = None
    if sweep is None and config.tracking.store != "none":
        parent = announce_parent(job_dir, [f"model={config.model.name}", "sweep.search=best_batch"])
        config = replace(config, sweep=replace(config.sweep, parent_run_id=str(parent)))
    found: dict[int, Json] = {}

    def trial(size: int) -> float | None:
        found[size] = run_trial(config, size, job_dir / f"b{size}", terminal, sweep)
        document = found[size]
        rate = (document.get("metrics") or {}).get("generated_tokens_per_s")
        terminal.note(
            f"batch {size}: " + (document["status"] if rate is None else f"{rate:.4g} tokens/s")
        )
        if document["status"] not in ("ok", *TOO_LARGE):
            raise SearchStopped
        return rate

    step = config.launcher.ranks * config.launcher.nodes
    settings = config.sweep
    try:
        tried = best_batch(
            trial, config.batch.batch_size, step, settings.search_max_batch, settings.search_trials
        )
    except SearchStopped:
        tried = {}
    best = max(
        (size for size, rate in tried.items() if rate),
        key=lambda size: tried[size] or 0.0,
        default=None,
    )
    document = found[best if best is not None else list(found)[-1]]
    outcome = outcome_of_search(document, best, found, job_dir)
    if parent is not None:
        close_parent(parent, config.tracking.uri, outcome.status)
    return finish(outcome, job_dir, terminal)


def run_trial(
    config: RunConfig, size: int, folder: Path, terminal: Terminal, sweep: Sweep | None
) -> Json:
    """Reuse or run one batch size, and return its result document."""
    if Interrupts.received or (sweep is not None and sweep.stopped()):
        raise SearchStopped
    trial = config.with_batch(size)
    if _is_default_path(config):
        trial = trial.changed(offload={"nvme_path": str(folder / "swap")})
    earlier = sweep.reusable.get(key_here(trial)) if sweep is not None and sweep.reusable else None
    if earlier is not None and stands_now(earlier, trial):
        return note_reused(earlier, folder)
    forked = config.launcher.fork_workers
    stopped = never if sweep is None else lambda: sweep.stopped() == "interrupted"
    outcome = run_job(trial, folder, Quiet(terminal, size), forked=forked, stopped=stopped)
    return read_result(folder / RESULT_FILE) or outcome.document()


def _is_default_path(config: RunConfig) -> bool:
    return config.offload.nvme_path is not None and Path(config.offload.nvme_path).name == "swap"


class Quiet(Terminal):
    """Leave out a trial's own tables; its progress and warnings are the search's."""

    among_others: ClassVar[bool] = True

    def __init__(self, search: Terminal, size: int) -> None:
        super().__init__("text", name=f"{search.name} batch.batch_size={size}", err=search.err)
        self._live = search.live
        self._search = search

    def frame(self, progress: JobProgress, now_s: float) -> RenderableType:
        """Return what the search's own job would be drawn as."""
        return self._search.frame(progress, now_s)

    def finish(self, outcome: Outcome) -> None:
        """Show nothing: the search says one line."""


def outcome_of_search(
    document: Json, best: int | None, found: dict[int, Json], job_dir: Path
) -> Outcome:
    """Return the best trial's result, with how many were tried; where none ran, why."""
    if document["status"] == "refused":
        return refusal(document["problems"], job_dir)
    metrics = dict(document.get("metrics") or {})
    reason = document.get("reason")
    if best is not None:
        metrics |= {"best_batch_size": best, "search_trials": len(found)}
        rows = ", ".join(f"{size}: {_shown(trial)}" for size, trial in sorted(found.items()))
        reason = f"batch.batch_size={best} is the fastest of {rows}"
    return Outcome(
        status=document["status"],
        reason=reason,
        model=document.get("model"),
        plan=document.get("plan"),
        deepspeed=document.get("deepspeed"),
        metrics=metrics,
        warnings=tuple(document.get("warnings") or ()),
        run_id=document.get("run_id"),
        job_dir=str(job_dir),
    )


def _shown(document: Json) -> str:
    rate = (document.get("metrics") or {}).get("generated_tokens_per_s")
    return document["status"] if rate is None else f"{rate:.4g} tokens/s"
