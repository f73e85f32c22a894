"""Show a sweep: its jobs before it, a line for each that finished, its results after it."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from zinfer.driver.tables import new_table
from zinfer.driver.terminal import Terminal
from zinfer.job.outcome import Json, Outcome
from zinfer.sweep.earlier_runs import EarlierRun
from zinfer.sweep.record import Sweep, SweepJob
from zinfer.units import format_bytes, format_roughly, format_seconds

if TYPE_CHECKING:
    from rich.table import Table

TIERS = ("device", "host", "pinned", "disk")
VERDICTS = {
    "fits": "fits",
    "does_not_fit": "will be refused",
    "refused": "will be refused",
    "unknown": "not known",
}
REASON_CHARACTERS = 160


def plan_table(sweep: Sweep) -> Table:
    """Return a table of the jobs: what each needs, and whether it will run."""
    from rich.markup import escape

    assert sweep.jobs is not None
    swept = sweep.swept()
    same = (
        " ".join(override for override in sweep.jobs[0].overrides if override not in swept)
        if sweep.jobs
        else ""
    )
    shown = new_table(
        escape(f"{len(sweep.jobs)} jobs: {same}".rstrip(": ")),
        "job",
        "",
        *TIERS,
        "plan",
        left=(0, 1, 6),
    )
    for job in sweep.jobs:
        needs = [
            format_bytes(job.needed_bytes[tier]) if tier in job.needed_bytes else ""
            for tier in TIERS
        ]
        shown.add_row(
            str(job.num), escape(_varying(job, swept)), *needs, escape(_verdict(job, sweep))
        )
    return shown


def _varying(job: SweepJob, swept: set[str]) -> str:
    return " ".join(override for override in job.overrides if override in swept)


def _verdict(job: SweepJob, sweep: Sweep) -> str:
    if job.state == "reused" and job.key in sweep.reusable:
        earlier = sweep.reusable[job.key]
        return f"reused: run {earlier.run_id[:8]}" + (
            "" if earlier.ended_well else f", {earlier.status}"
        )
    said = VERDICTS[job.verdict]
    return said if job.reason is None else f"{said}: {_short(job.reason)}"


def result_table(sweep: Sweep, rows: Iterable[tuple[int, list[str], Json | None]]) -> Table:
    """Return a table of the results, with the reason of each job that did not end well."""
    from rich.markup import escape

    swept = sweep.swept()
    shown = new_table(
        "sweep",
        "job",
        "",
        "status",
        "tokens/s",
        "prefill",
        "decode step",
        "host peak",
        "reason",
        left=(0, 1, 2, 7),
    )
    for num, overrides, document in rows:
        varying = " ".join(override for override in overrides if override in swept or not swept)
        if document is None:
            shown.add_row(str(num), escape(varying), "not run", *[""] * 5)
            continue
        metrics = document.get("metrics") or {}
        status = document["status"] + (" (reused)" if document.get("reused") else "")
        shown.add_row(
            str(num),
            escape(varying),
            status,
            _rate(metrics.get("generated_tokens_per_s")) + _best(metrics),
            format_seconds(metrics["prefill_s"]) if "prefill_s" in metrics else "",
            format_seconds(metrics["decode_step_s"]) if "decode_step_s" in metrics else "",
            format_bytes(metrics["peak_host_rss_bytes"])
            if "peak_host_rss_bytes" in metrics
            else "",
            escape(_short(reason_of(document))),
        )
    return shown


def reason_of(document: Json) -> str:
    """Return in one line why a job did not end well."""
    if document["status"] in ("ok", "planned"):
        return ""
    return " ".join(
        str(document.get("reason") or "; ".join(document.get("problems") or [])).split()
    )


def _best(metrics: Json) -> str:
    """Return the batch size that a search found: the numbers are of it."""
    return f" (batch {metrics['best_batch_size']:g})" if "best_batch_size" in metrics else ""


def _rate(tokens_per_s: float | None) -> str:
    return "" if tokens_per_s is None else f"{tokens_per_s:.4g}"


def _short(text: str) -> str:
    return text if len(text) <= REASON_CHARACTERS else text[: REASON_CHARACTERS - 1] + "…"


class SweepTerminal(Terminal):
    """Show one line for each finished job, and between them how far the running one is.

    The latter, and the sweep's time, are shown where stderr is a terminal.
    """

    def __init__(self, sweep: Sweep, num: int, overrides: list[str]) -> None:
        swept = sweep.swept()
        varying = " ".join(override for override in overrides if override in swept) or " ".join(
            overrides
        )
        super().__init__(sweep.output_format, name=f"job {num} {varying}".rstrip())
        self._sweep = sweep
        self._what = varying

    def finish(self, outcome: Outcome) -> None:
        """Show the job's one line."""
        rate = outcome.metrics.get("generated_tokens_per_s")
        said = outcome.status if rate is None else f"{rate:.4g} tokens/s"
        if outcome.status not in ("ok", "planned"):
            said += f": {reason_of(outcome.document())}"
        self._line_of_job(said)

    def reused(self, earlier: EarlierRun) -> None:
        """Show the line of a job that needs no run."""
        rate = "" if earlier.tokens_per_s is None else f"{earlier.tokens_per_s:.4g} tokens/s, "
        status = "" if earlier.ended_well else f"{earlier.status}, "
        self._line_of_job(f"{rate}{status}reused from run {earlier.run_id}")

    def _line_of_job(self, said: str) -> None:
        done, failed = self._sweep.count()
        total = len(self._sweep.jobs) if self._sweep.jobs is not None else None
        count = f"{done}/{total}" if total else str(done)
        self.note(f"[{count}] {self._what}: {said}{self._how_far(done, failed, total)}")

    def _how_far(self, done: int, failed: int, total: int | None) -> str:
        """Return what failed, the time so far, and the time left at the pace of jobs that ran.

        It is empty where nobody watches a live line.
        """
        if not self._live:
            return ""
        elapsed_s = self._sweep.elapsed_s()
        parts = [f"{failed} failed"] if failed else []
        parts.append(f"{format_seconds(elapsed_s)} so far")
        if self._sweep.jobs is not None and total is not None:
            reused = sum(job.state == "reused" for job in self._sweep.jobs)
            ran = max(1, done - reused)
            left = total - done
            if left > 0:
                parts.append(f"{left} left, about {format_roughly(elapsed_s / ran * left)}")
        return f"  ({', '.join(parts)})"
