"""Sentences that a reader needs before the numbers."""

from __future__ import annotations

import statistics
from collections import defaultdict
from collections.abc import Iterable, Sequence

from multirun_analysis.configuration import CIRCUMSTANCES, RATE, Configuration
from multirun_analysis.runs import Run
from zinfer.config import METHOD_VERSION
from zinfer.machine.profile import NOTICED_SLOWDOWN
from zinfer.units import counted

YARDSTICK = "yardstick_s"
NAMED = 5
"""Runs and reasons that one sentence names."""


def run_notes(runs: Iterable[Run]) -> list[str]:
    """Say what is odd about single runs: other methods, missing numbers, verdicts, reuse."""
    runs = list(runs)
    older = [run for run in runs if run.method_version not in (str(METHOD_VERSION), "unknown")]
    unversioned = [run for run in runs if run.method_version == "unknown" and run.status == "ok"]
    unmeasured = [run for run in runs if run.status == "ok" and RATE not in run.metrics]
    running = [run for run in runs if run.status == "running"]
    reused = [run for run in runs if run.reused]
    notes = []
    if reused:
        notes.append(
            f"{len(reused)} of {counted(len(runs), 'run')} measured before this sweep, which took "
            "the results over: same configuration, code and machine."
        )
    if older:
        versions = ", ".join(sorted({run.method_version for run in older}))
        notes.append(
            f"{counted(len(older), 'run')} measured with method version {versions}, today's is "
            f"{METHOD_VERSION}: what is timed or what a metric means has changed (CHANGELOG.md). "
            "They are shown, and never compared with the others."
        )
    if unversioned:
        notes.append(
            f"{counted(len(unversioned), 'run')} without a method version: compared only among "
            "themselves."
        )
    if unmeasured:
        names = ", ".join(run.name for run in unmeasured[:NAMED])
        notes.append(
            f"{counted(len(unmeasured), 'run')} ended well but logged no {RATE}, so no speed is "
            f"shown for them: {names}."
        )
    if running:
        notes.append(
            f"{counted(len(running), 'run')} had not ended when this was written, or ended without "
            "being able to say so."
        )
    return [*notes, *stability_notes(runs), *quality_notes(runs), *profile_notes(runs)]


def profile_notes(runs: Sequence[Run]) -> list[str]:
    """Name the most expensive operations of the runs that profiled a decode step."""
    profiled = [run for run in runs if run.tags.get("zinfer.profile")]
    notes = [
        f"{run.name}, most expensive operations of a decode step: "
        f"{'; '.join(run.tags['zinfer.profile'].splitlines())}."
        for run in profiled[:NAMED]
    ]
    if len(profiled) > NAMED:
        notes.append(f"{len(profiled) - NAMED} more runs profiled a decode step (zinfer.profile).")
    return notes


def stability_notes(runs: Sequence[Run]) -> list[str]:
    """Name the runs whose own verdict says that their numbers moved, and why."""
    notes = []
    for verdict, advice in (
        ("disturbed", "Run them again before you rely on them."),
        ("noisy", "Small differences between them are not differences."),
    ):
        found = [run for run in runs if run.status == "ok" and run.stability == verdict]
        if found:
            notes.append(f"{counted(len(found), 'run')} {verdict}. {advice}")
            notes += [_named_reason(run) for run in found[:NAMED]]
        if len(found) > NAMED:
            rest = f"{len(found) - NAMED} more {verdict}"
            notes.append(f"{rest}: the table of warnings has their reasons.")
    return notes


def _named_reason(run: Run) -> str:
    """Return a run's name and why it says that its numbers moved."""
    reason = run.tags.get("zinfer.stability_reason") or "no reason was logged"
    return f"{run.name}: {'; '.join(reason.splitlines())}."


def quality_notes(runs: Sequence[Run]) -> list[str]:
    """Name the runs whose text is worse than their own limits allow."""
    found = [run for run in runs if run.tags.get("zinfer.quality") == "beyond_limits"]
    if not found:
        return []
    reasons = [
        "; ".join((run.tags.get("zinfer.quality_reason") or "no reason was logged").splitlines())
        for run in found
    ]
    said = list(
        dict.fromkeys(f"{run.name}: {why}" for run, why in zip(found, reasons, strict=True))
    )
    if len(said) > NAMED:
        said[NAMED:] = [f"{len(said) - NAMED} more are in the table of warnings"]
    return [
        f"{counted(len(found), 'run')} beyond the limits of quality. {'. '.join(said)}. "
        "Their speed is shown; their text is not the unquantised model's."
    ]


def mixtures(found: Sequence[Configuration]) -> list[str]:
    """Say which circumstances differ among these configurations."""
    sentences = []
    contexts = {item.context for item in found}
    rule = "kept apart: never averaged together, never divided by each other."
    for field_name, noun in CIRCUMSTANCES.items():
        values = sorted({getattr(item, field_name) for item in contexts})
        if len(values) > 1:
            named = [value[:7] if field_name == "commit" else value for value in values]
            if field_name == "hardware":
                named = sorted({item.device for item in contexts})
            shown = ", ".join(named[:6]) + (", ..." if len(named) > 6 else "")
            sentences.append(f"Runs of {len(values)} {noun} are here ({shown}), {rule}")
    ran = [item for item in found if not item.planned]
    dirty = [item for item in ran if item.context.dirty == "true"]
    if dirty:
        sentences.append(
            f"{len(dirty)} of {len(ran)} configurations ran from a changed working tree "
            "(marked *): their commit alone does not reproduce them."
        )
    measured = [item for item in found if item.measured]
    if measured and all(item.context.weights == "dummy" for item in measured):
        sentences.append(
            "All weights are dummy (random): speed and memory are those of the architecture, the "
            "text means nothing."
        )
    if (apart := slowest_over_fastest(found)) > NOTICED_SLOWDOWN:
        sentences.append(
            f"The machine itself was up to {apart:.1f} times slower in some of these runs than in "
            "others (yardstick_s: neighbours, heat, power saving): smaller differences may be its "
            "own. Run those again that matter."
        )
    return sentences


def slowest_over_fastest(found: Iterable[Configuration]) -> float:
    """Compare what one machine took for the same work: slowest over fastest configuration.

    Only configurations of one machine and one number of threads are compared; 1.0 where nobody
    timed the yardstick.
    """
    paces: defaultdict[tuple[str | None, ...], list[float]] = defaultdict(list)
    for item in found:
        seconds = [run.metrics[YARDSTICK] for run in item.ok_runs if run.metrics.get(YARDSTICK)]
        if seconds:
            threads = [
                item.choices.get(name) for name in ("launcher.omp_threads", "launcher.ranks")
            ]
            paces[item.context.hardware, *threads].append(statistics.median(seconds))
    return max((max(seconds) / min(seconds) for seconds in paces.values()), default=1.0)
