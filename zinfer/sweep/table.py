"""Tables of a sweep: its jobs before it, its results after it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from zinfer.driver.label import as_typed
from zinfer.driver.tables import new_table
from zinfer.job.outcome import Json
from zinfer.sweep.record import Sweep, SweepJob
from zinfer.units import counted, format_bytes, format_seconds

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
SPARE_OF_PLANS = ("pinned", "disk", "device", "host")
SPARE_OF_RESULTS = ("host peak", "prefill", "decode step")
"""Columns that a narrow terminal does without, in the order in which they go."""


def plan_table(sweep: Sweep) -> Table:
    """Return a table of the jobs: what each needs, and whether it will run."""
    from rich.markup import escape

    assert sweep.jobs is not None
    swept = sweep.swept
    same = (
        " ".join(as_typed(each) for each in sweep.jobs[0].overrides if each not in swept)
        if sweep.jobs
        else ""
    )
    tiers = [tier for tier in TIERS if any(tier in job.needed_bytes for job in sweep.jobs)]
    shown = new_table(
        escape(f"{counted(len(sweep.jobs), 'job')}: {same}".rstrip(": ")),
        "job",
        "",
        *tiers,
        "plan",
        left=(0, 1, 2 + len(tiers)),
    )
    for job in sweep.jobs:
        needs = [
            format_bytes(job.needed_bytes[tier]) if tier in job.needed_bytes else ""
            for tier in tiers
        ]
        shown.add_row(
            str(job.num),
            escape(" ".join(sweep.varying(job.overrides))),
            *needs,
            escape(_verdict(job, sweep)),
        )
    return shown


def _verdict(job: SweepJob, sweep: Sweep) -> str:
    if job.state == "reused" and job.key in sweep.reusable:
        earlier = sweep.reusable[job.key]
        return f"reused: run {earlier.run_id[:8]}" + (
            "" if earlier.ended_well else f", {earlier.status}"
        )
    return VERDICTS[job.verdict]


def result_table(sweep: Sweep, rows: Iterable[tuple[int, list[str], Json | None]]) -> Table:
    """Return a table of the results; `reasons` says why some jobs did not end well."""
    from rich.markup import escape

    shown = new_table(
        "sweep",
        "job",
        "",
        "status",
        "tokens/s",
        "prefill",
        "decode step",
        "host peak",
        left=(0, 1, 2),
    )
    for num, overrides, document in rows:
        varying = " ".join(sweep.varying(overrides))
        if document is None:
            shown.add_row(str(num), escape(varying), "not run", *[""] * 4)
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
        )
    return shown


def reasons(why: Iterable[tuple[int, str | None]]) -> Iterator[str]:
    """Yield a line for each different reason: 'jobs 4, 5: batch.batch_size=1000 is too large'.

    Args:
        why: number of each job, and why it will not run or did not end well, if so.
    """
    nums: dict[str, list[int]] = {}
    for num, reason in why:
        if reason:
            nums.setdefault(reason, []).append(num)
    for reason, of in nums.items():
        yield f"{'jobs' if len(of) > 1 else 'job'} {', '.join(map(str, of))}: {_short(reason)}"


def reason_of(document: Json) -> str:
    """Return in one line why a job did not end well."""
    if document.get("status", "ok") in ("ok", "planned"):
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
