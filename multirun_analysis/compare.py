"""Runs -> configurations, and which of their choices differ. Pure: same runs, same comparison."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from multirun_analysis.configuration import Configuration, Context
from multirun_analysis.labels import (
    ALWAYS_SHOWN,
    LABELS,
    NOT_CHOICES,
    OF_QUANTISED,
    QUANTISED,
    column_order,
)
from multirun_analysis.runs import Run

BOX = "hardware.name"
THIS_MACHINE = (BOX, "detect")
"""Not worth a word: the machine that the run was on."""


def configurations(runs: Iterable[Run]) -> tuple[Configuration, ...]:
    """Group runs of the same choices under the same circumstances, in the order they first ran."""
    groups: dict[tuple[Context, tuple[tuple[str, str], ...]], list[Run]] = {}
    for run in runs:
        groups.setdefault((context(run), tuple(sorted(_choices(run).items()))), []).append(run)
    named = _telling_devices({context_ for context_, _ in groups})
    return tuple(
        Configuration(dict(choices), named[context_], tuple(group))
        for (context_, choices), group in groups.items()
    )


def _telling_devices(contexts: Iterable[Context]) -> dict[Context, Context]:
    """Add the fingerprint to a device's name where two machines have the same name."""
    contexts = list(contexts)
    machines: dict[str, set[str]] = {}
    for item in contexts:
        machines.setdefault(item.device, set()).add(item.hardware)
    return {
        item: replace(item, device=f"{item.device} ({item.hardware[:6]})")
        if len(machines[item.device]) > 1
        else item
        for item in contexts
    }


def context(run: Run) -> Context:
    """Return the circumstances of a run, `unknown` where it does not say.

    A plan for a published box has that box as its machine, wherever it was planned.
    """
    tag = run.tags.get
    box = run.params.get("hardware.name", "detect")
    elsewhere = run.params.get("task") == "plan" and box != "detect"
    return Context(
        weights=run.params.get("weights", "unknown"),
        hardware=box if elsewhere else tag("zinfer.hardware", "unknown"),
        device=run.params.get("hardware.device_name", box)
        if elsewhere
        else tag("zinfer.device", "unknown"),
        commit=tag("zinfer.commit", "unknown"),
        dirty=tag("zinfer.dirty", "unknown"),
        method_version=run.method_version,
    )


def _choices(run: Run) -> dict[str, str]:
    """Return what was chosen: parameters without those that the run does not read."""
    unread = NOT_CHOICES
    if run.params.get("dtype.weights") not in QUANTISED:
        unread |= OF_QUANTISED
        if run.params.get("dtype.kernel") == "auto":  # as in runs that do not say it
            unread |= {"dtype.kernel"}
    scored = run.params.get("quality.enabled", "false") != "false"
    groups = () if scored and run.params.get("weights") == "pretrained" else ("quality.",)
    return {
        name: value
        for name, value in run.params.items()
        if name not in unread and not name.startswith(groups)
    }


def varied(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Return the choices that differ among these, in the order of LABELS.

    What only follows from another choice is left out: sizes from the model's name, bandwidths
    from the box, dtype.compute from dtype.weights.
    """
    names = {
        name
        for item in found
        for name in item.choices
        if not (name.startswith("model.") and name != "model.name") and name != "task"
    }
    differing = {name for name in names if len({item.choices.get(name) for item in found}) > 1}
    follows = {
        name for name in differing if name not in LABELS and _follows_from_group(name, found)
    }
    return tuple(sorted(differing - follows, key=column_order))


def _follows_from_group(name: str, found: Sequence[Configuration]) -> bool:
    """Tell if each value of the group's main choice leaves this setting one value."""
    main = next((label for label in LABELS if label.split(".")[0] == name.split(".")[0]), None)
    if main is None:
        return False
    seen: dict[str | None, set[str | None]] = {}
    for item in found:
        seen.setdefault(item.choices.get(main), set()).add(item.choices.get(name))
    return all(len(values) == 1 for values in seen.values())


def shown_choices(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Return the columns of a table: what varies, and what a reader asks for first."""
    return tuple(sorted({*varied(found), *ALWAYS_SHOWN}, key=column_order))


def differing_choices(found: Sequence[Configuration]) -> tuple[str, ...]:
    """Return the columns of a narrow table: the model, and what varies."""
    return tuple(sorted({*varied(found), "model.name"}, key=column_order))


def details(found: Sequence[Configuration], said: Sequence[str] = ALWAYS_SHOWN) -> tuple[str, ...]:
    """Return the choices that differ besides those that a label already says.

    The kind of weights and the box are circumstances, which stand elsewhere.
    """
    return tuple(
        name for name in varied(found) if name not in said and name not in ("weights", BOX)
    )


def constants(found: Sequence[Configuration], shown: Sequence[str]) -> dict[str, str]:
    """Return the choices that were the same everywhere, if they have a label and no column."""
    values = {
        name: {item.chosen(name) for item in found}
        for name in LABELS
        if name not in shown and any(name in item.choices for item in found)
    }
    same = {name: value for name, (value, *others) in values.items() if not others}
    return {name: value for name, value in same.items() if (name, value) != THIS_MACHINE}


def same_circumstances(found: Sequence[Configuration]) -> list[tuple[str, list[Configuration]]]:
    """Group what may be compared: one model, workload and context, under a telling name."""
    groups: dict[tuple[object, ...], list[Configuration]] = {}
    for item in found:
        groups.setdefault((item.model, item.workload, item.context), []).append(item)
    ordered = sorted(groups.items(), key=lambda entry: str(entry[0]))
    named = []
    for (model, _, _), group in ordered:
        rivals = [other for other in groups if other[0] == model]
        parts = [
            str(model),
            *_circumstance_names(
                group[0], {other[1] for other in rivals}, [other[2] for other in rivals]
            ),
        ]
        named.append((", ".join(parts), group))
    return named


def _circumstance_names(
    item: Configuration, workloads: set[object], contexts: Sequence[object]
) -> Iterator[str]:
    """Yield what tells a group from others of the same model."""
    names = {
        "weights": f"{item.context.weights} weights",
        "hardware": item.context.device,
        "commit": f"commit {item.context.commit_label}",
        "method_version": f"method {item.context.method_version}",
    }
    if len(workloads) > 1:
        yield f"{item.workload[0]} + {item.workload[1]} tokens"
    for field_name, text in names.items():
        if len({getattr(context_, field_name) for context_ in contexts}) > 1:
            yield text
