"""Groups that figures are drawn of: they may be compared; and the fastest of each."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from multirun_analysis.configuration import Configuration
from multirun_analysis.figures.canvas import COLOURS, OFFLOAD_COLOURS, short
from multirun_analysis.labels import WEIGHTS_ON, offload_order

MAX_PANELS = 12
MAX_BARS = 14

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
            lines = [series_name(fastest) + f", batch {fastest.batch_size}"]
            if len(groups) > 1:
                lines.insert(0, short(label))
            chosen.append(("\n".join(lines), fastest))
    return chosen


def series_of(group: Group) -> list[tuple[str, str]]:
    """Return (place, type) of the weights of all configurations, the fastest place first."""
    found = {(item.offload, item.dtype) for item in group}
    return sorted(found, key=lambda key: (offload_order(key[0]), key[1]))


def series_name(item: Configuration) -> str:
    """Say 'NVMe, int4'."""
    return f"{WEIGHTS_ON.get(item.offload, short(item.offload))}, {item.dtype}"


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
