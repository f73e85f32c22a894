"""Now against before: the same configurations, of two commits, sweeps or experiments."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from multirun_analysis.compare import configurations, differing_choices, shown_choices
from multirun_analysis.configuration import RATE, Configuration
from multirun_analysis.labels import ALWAYS_SHOWN
from multirun_analysis.runs import STATUS_WORDS, ReportError, Run, Selection
from multirun_analysis.spread import Spread, speedup
from multirun_analysis.store import MlflowStore
from multirun_analysis.table import Column, Table, number_cell, spread_cells, text_cell
from multirun_analysis.tables.choices import choice_cell, choice_columns
from multirun_analysis.tables.speedup import ratio_cell
from zinfer.units import counted

COMMIT = re.compile(r"[0-9a-f]{7,40}")
RUN_ID = re.compile(r"[0-9a-f]{32}")
COMMITS_NAMED = 5
"""Commits that a refusal names, the newest first."""
GIT_TIMEOUT_S = 5.0
PREDICTIONS = {
    "predicted_generated_tokens_per_s": "tokens/s",
    "predicted_decode_step_s": "step s",
    "predicted_prefill_s": "prefill s",
    "ceiling_generated_tokens_per_s": "tokens/s at most",
    "plan_device_needed_bytes": "device bytes",
    "plan_host_needed_bytes": "host bytes",
}
"""Metric that a plan logs -> what a sentence calls it."""
SAME_PREDICTION = 1e-6
"""Relative difference up to which two predictions are one: they are rounded alike."""


@dataclass(frozen=True, kw_only=True)
class Pair:
    """One configuration, now and before."""

    now: Configuration
    before: Configuration
    ratio: Spread | None
    """Of the rates, now over before; None where one was not measured."""

    @property
    def slower(self) -> bool:
        """True where the error of the ratio tells it from 1, and it is below."""
        ratio = self.ratio
        return ratio is not None and ratio.median < 1 and not ratio.around_one

    @property
    def broken(self) -> bool:
        """True where it was measured before and ends badly now."""
        return self.before.measured and self.now.status not in ("ok", "planned", "running")

    def fails(self, allowed: float) -> bool:
        """Tell if it is slower by more than `allowed` (a share) and beyond its error."""
        if self.broken:
            return True
        return self.slower and self.ratio is not None and self.ratio.median < 1 - allowed

    @property
    def verdict(self) -> str:
        """'slower', 'faster', 'within spread', or why nothing can be said."""
        if self.broken:
            return f"now {STATUS_WORDS.get(self.now.status, self.now.status)}"
        if self.ratio is None:
            return "not measured"
        if self.ratio.around_one or self.ratio.median == 1:
            return "within spread"
        unsure = "" if self.ratio.stddev is not None else ", measured once"
        return ("slower" if self.ratio.median < 1 else "faster") + unsure


@dataclass(frozen=True, kw_only=True)
class Against:
    """Two selections, paired."""

    now: str
    before: str
    pairs: tuple[Pair, ...]
    notes: tuple[str, ...]
    changes: tuple[str, ...]
    """Sentences on predictions that are not what they were."""

    def failed(self, allowed: float) -> tuple[Pair, ...]:
        """Return the pairs that are slower than allowed, or no longer run."""
        return tuple(pair for pair in self.pairs if pair.fails(allowed))


def earlier_selection(store: MlflowStore, name: str, checkout: Path) -> Selection:
    """Find what --against names: an experiment, a run or sweep, or a commit.

    Args:
        checkout: repository of zinfer; a commit may be named there as git does: HEAD, a branch.

    Raises:
        ReportError: the store has nothing of that name.
    """
    if store.has_experiment(name):
        return store.select(experiment=name, run_id=None, where=None)
    if RUN_ID.fullmatch(name) and store.has_run(name):
        return store.select(experiment=None, run_id=name, where=None)
    commit = name if COMMIT.fullmatch(name) else commit_named(name, checkout)
    found = store.with_commit(commit) if commit else None
    if found is not None:
        return found
    if commit is None:
        said = "is no experiment, no run and no commit of this store"
    elif commit == name:
        said = "is no run, and no run of zinfer in this store has this commit"
    else:
        said = f"is commit {commit[:7]}, and no run of zinfer in this store has it"
    raise ReportError(f"--against {name} {said}. {_there_is(store)}")


def _there_is(store: MlflowStore) -> str:
    """Say what --against may be set to in this store."""
    commits = ", ".join(commit[:7] for commit in store.newest_commits(COMMITS_NAMED))
    there = f": it has runs of {commits}" if commits else ""
    return (
        "Set --against to the name of an experiment, the id of a run, or seven or more digits of "
        f"a commit{there}"
    )


def commit_named(name: str, repository: Path) -> str | None:
    """Return the commit that git knows under this name (HEAD, HEAD~1, main), or None.

    None also where the folder is no repository of its own.
    """
    if not (repository / ".git").exists():
        return None
    wanted = ["rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}"]
    try:
        done = subprocess.run(
            ["git", "-C", str(repository), *wanted],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=GIT_TIMEOUT_S,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None if done.returncode == 0 else None


def compare_against(now: Selection, before: Selection) -> Against:
    """Pair what is equal but for its commit, and divide now by before.

    Runs of other machines, weights or methods are never paired. A run in both selections counts
    as a run of now.
    """
    ids = {run.run_id for run in now.runs}
    earlier = [run for run in before.runs if run.run_id not in ids]
    references = {_key(item): item for item in _any_commit(earlier)}
    found = _any_commit(now.runs)
    pairs = tuple(
        Pair(now=item, before=references[_key(item)], ratio=_ratio(item, references[_key(item)]))
        for item in found
        if _key(item) in references
    )
    names = shown_choices([pair.now for pair in pairs])
    alone = len(found) - len(pairs)
    notes = []
    if alone:
        notes.append(
            f"{counted(alone, 'configuration')} of {len(found)} without a pair in {before.title}: "
            "other choices, machine, weights or method."
        )
    return Against(
        now=now.title,
        before=before.title,
        pairs=pairs,
        notes=tuple(notes),
        changes=tuple(sentence for pair in pairs for sentence in changed_predictions(pair, names)),
    )


def _any_commit(runs: Sequence[Run]) -> tuple[Configuration, ...]:
    """Group runs whatever their commit, which is what an --against is asked about."""
    blank = {"zinfer.commit": "any", "zinfer.dirty": "any"}
    return configurations(replace(run, tags={**run.tags, **blank}) for run in runs)


def _key(item: Configuration) -> tuple[object, ...]:
    return item.context, tuple(sorted(item.choices.items()))


def _ratio(now: Configuration, before: Configuration) -> Spread | None:
    mine, theirs = now.rate_spread, before.rate_spread
    return speedup(mine, theirs) if mine is not None and theirs is not None else None


def changed_predictions(pair: Pair, names: Sequence[str] = ALWAYS_SHOWN) -> list[str]:
    """Say which predictions of one configuration are not what they were.

    Args:
        names: choices that tell it from the others.
    """
    changed = []
    for metric, name in PREDICTIONS.items():
        now, before = pair.now.value(metric), pair.before.value(metric)
        if now is None or before is None or now == before:
            continue
        if abs(now - before) > SAME_PREDICTION * max(abs(now), abs(before)):
            changed.append(f"{name} {before:.4g} -> {now:.4g}")
    bound = pair.before.binding_resource, pair.now.binding_resource
    if None not in bound and bound[0] != bound[1]:
        changed.append(f"bound by {bound[0]} -> {bound[1]}")
    return [f"{pair.now.label(names)}: {'; '.join(changed)}"] if changed else []


def against_table(found: Against) -> Table:
    """Build one row for each pair: both rates, and now over before."""
    items = [pair.now for pair in found.pairs]
    choices = differing_choices(items)
    columns = (
        *choice_columns(choices),
        Column(key=f"before_{RATE}", head="before", number=True, help="tokens/s"),
        Column(key=f"before_{RATE}_stddev", head="", csv_only=True),
        Column(key=f"now_{RATE}", head="now", number=True, help="tokens/s"),
        Column(key=f"now_{RATE}_stddev", head="", csv_only=True),
        Column(key="ratio", head="now / before", number=True),
        Column(key="ratio_stddev", head="", csv_only=True),
        Column(key="verdict", head="verdict"),
    )
    rows = tuple(
        (
            *(choice_cell(pair.now, choice) for choice in choices),
            *spread_cells(pair.before.rate_spread)[:2],
            *spread_cells(pair.now.rate_spread)[:2],
            ratio_cell(pair.ratio) if pair.ratio else text_cell(None),
            number_cell(pair.ratio.stddev if pair.ratio else None),
            text_cell(pair.verdict, kind="bad" if pair.broken or pair.slower else None),
        )
        for pair in found.pairs
    )
    return Table(
        name="against",
        title=f"Against {found.before}",
        note=f"Generated tokens/s of {found.now} over those of {found.before}, ± first-order error "
        "of the quotient.",
        columns=columns,
        rows=rows,
    )
