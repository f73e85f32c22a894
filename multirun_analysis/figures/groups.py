"""Groups that figures are drawn of: they may be compared; and the fastest of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from multirun_analysis.compare import details
from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.canvas import COLOURS, OFFLOAD_COLOURS, short
from multirun_analysis.labels import WEIGHTS_ON, offload_order

MAX_PANELS = 12
MAX_BARS = 14
MAX_SERIES = 8
"""There are so many markers."""

Group = Sequence[Configuration]
Named = tuple[str, Group]
"""A group, and the name that tells it from the others."""


def leaders(groups: Sequence[Named]) -> list[tuple[str, Configuration]]:
    """Choose the fastest configuration of each group and each place of the weights."""
    chosen = []
    for label, group in groups:
        offloads = {item.offload for item in group if item.measured}
        for offload in sorted(offloads, key=offload_order):
            fastest = max(
                (item for item in group if item.measured and item.offload == offload),
                key=lambda item: item.rate,
            )
            lines = [series_name(series(fastest)) + f", batch {fastest.batch_size}"]
            if len(groups) > 1:
                lines.insert(0, short(label))
            chosen.append(("\n".join(lines), fastest))
    return chosen


Series = tuple[str, str, str]
"""Place and type of the weights, and in words what else tells it from the others."""


def series_names(group: Group, most: int = MAX_SERIES) -> tuple[str, ...]:
    """Return the choices besides place, type and batch that tell series apart.

    None where that would be more than `most` series: nobody tells so many marks apart.
    """
    names = details(group)
    return names if len(series_of(group, names)) <= most else ()


def series_of(group: Group, names: Sequence[str] = ()) -> list[Series]:
    """Return the series of all configurations, the fastest place first.

    Args:
        names: choices that make series of their own, besides place and type of the weights.
    """
    found = {series(item, names) for item in group}
    return sorted(found, key=lambda key: (offload_order(key[0]), *key[1:]))


def series(item: Configuration, names: Sequence[str] = ()) -> Series:
    """Return the series that a configuration belongs to."""
    return item.offload, item.dtype, item.label(names)


def series_name(key: Series) -> str:
    """Say 'NVMe, int4, rounding searched'."""
    offload, dtype, more = key
    return ", ".join(filter(None, (WEIGHTS_ON.get(offload, short(offload)), dtype, short(more))))


def styles_of(keys: Sequence[Series]) -> dict[Series, int]:
    """Number the series of one place; places differ in colour."""
    kinds = sorted({key[1:] for key in keys})
    return {key: kinds.index(key[1:]) for key in keys}


def colour_of(offload: str) -> str:
    """Return a colour for each place of the weights."""
    return OFFLOAD_COLOURS.get(offload, COLOURS[3])


def circumstances(found: Iterable[Configuration]) -> str:
    """Say 'NVIDIA RTX A6000; dummy weights; commit a1b2c3d; 512 + 32 prompt + new tokens.'"""
    found = list(found)
    contexts = [item.context for item in found]
    lengths = sorted({f"{prompt} + {new}" for prompt, new in (item.workload for item in found)})
    more = ", ..." if len(lengths) > 4 else ""
    parts = (
        ", ".join(sorted({context.device for context in contexts})),
        " and ".join(sorted({context.weights for context in contexts})) + " weights",
        "commit " + ", ".join(sorted({context.commit_label for context in contexts})),
        "method " + ", ".join(sorted({context.method_version for context in contexts})),
        f"{', '.join(lengths[:4])}{more} prompt + new tokens",
    )
    return "; ".join(parts) + "."


def left_out(shown: Sequence[object], limit: int, what: str) -> str:
    """Say ' 3 more models are in the tables.', or nothing."""
    return f" {len(shown) - limit} more {what} are in the tables." if len(shown) > limit else ""


def everything(groups: Sequence[Named]) -> list[Configuration]:
    """Return all configurations of all groups."""
    return [item for _, group in groups for item in group]
