"""The machines of published results: their bandwidths, and the most that they can stream."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from multirun_analysis.published.rows import UNCLEAR, Published

BANDWIDTH_TOLERANCE = 1.02
"""Published bandwidths have two digits."""
ARRAY_BYTES_PER_S = {"4x Gen4 NVMe": 10e9, "4x Gen5 NVMe": 27e9, "8x Gen5 NVMe": 48e9}
"""Reads from these arrays into GPU memory, as the text of the DeepNVMe blog of 2025-06 has them.

Its result rows name only the array.
"""


@dataclass(frozen=True, kw_only=True)
class Box:
    """The machine of a published result, as far as somebody published it."""

    name: str
    """File in conf/hardware."""
    host_to_device_bytes_per_s: float | None
    nvme_read_bytes_per_s: float | None
    source: str


BOX_NAMES = (
    ("A6000", "a6000"),
    ("T4", "t4"),
    ("V100", "v100"),
    ("H100", "h100_2nvme"),
    ("H200", "h200"),
    ("A100", "a100"),
)
"""Part of the published description -> file in conf/hardware. GH200 is none of them."""


def box_of(hardware: str) -> Box | None:
    """Find the published box with its bandwidths; None where conf/hardware does not have it.

    A disk speed in the description wins over the file: the same card was published with several
    disks.
    """
    name = next(
        (box for part, box in BOX_NAMES if re.search(rf"(?<![A-Z]){part}\b", hardware)), None
    )
    if name is None:
        return None
    known = _hardware_file(name)
    stated = published_nvme_bytes_per_s(hardware)
    sources = [
        source
        for source in (
            str(known.get("source") or ""),
            "its NVMe as published with the result" if stated else "",
        )
        if source
    ]
    return Box(
        name=name,
        host_to_device_bytes_per_s=_known(known, "host_to_device_bytes_per_s"),
        nvme_read_bytes_per_s=stated or _known(known, "nvme_read_bytes_per_s"),
        source="; ".join(sources),
    )


def published_nvme_bytes_per_s(hardware: str) -> float | None:
    """Parse a disk's speed: 'NVMe 5.6GB/s' -> 5.6e9; '4 NVMe Gen4 (3.25GB/s each)' -> 13e9.

    None for a description without one.
    """
    each = re.search(r"(\d+) NVMe[^;]*?\(([\d.]+)GB/s each\)", hardware)
    if each:
        return int(each[1]) * float(each[2]) * 1e9
    stated = re.search(r"(?:NVMe|disk|SSD|RAID0)[^;]*?~?([\d.]+)GB/s", hardware)
    if stated:
        return float(stated[1]) * 1e9
    return next((speed for array, speed in ARRAY_BYTES_PER_S.items() if array in hardware), None)


@cache
def _hardware_file(name: str) -> Mapping[str, object]:
    """Read conf/hardware/NAME.yaml; empty where there is none."""
    import yaml

    from zinfer.paths import conf_dir

    path = Path(conf_dir()) / "hardware" / f"{name}.yaml"
    if not path.is_file():
        return {}
    content = yaml.safe_load(path.read_text())
    return content if isinstance(content, dict) else {}


def _known(tree: Mapping[str, object], key: str) -> float | None:
    value = tree.get(key)
    return float(value) if isinstance(value, int | float) else None


def ceiling_bytes_per_s(row: Published) -> float | None:
    """Return the most that the box can stream, each share of the weights over its own path.

    Everything crosses the link to the device; what lies on NVMe crosses the disk too. None when a
    bandwidth that matters is not known.
    """
    box, shares = box_of(row.hardware), row.streamed_shares
    if box is None or not shares:
        return None
    total = sum(shares.values())
    limits = []
    if shares.get("nvme"):
        if box.nvme_read_bytes_per_s is None:
            return None
        limits.append(box.nvme_read_bytes_per_s * total / shares["nvme"])
    if box.host_to_device_bytes_per_s is not None:
        limits.append(box.host_to_device_bytes_per_s * row.devices)
    elif not shares.get("nvme"):
        return None
    return min(limits)


def explanation(row: Published) -> str | None:
    """Say what a number implies besides weights streaming at the speed of their path; or None."""
    if row.metric == UNCLEAR:
        return "whether prompt tokens are counted is not published"
    implied, limit = row.implied_bytes_per_s, ceiling_bytes_per_s(row)
    if implied is None or limit is None:
        return None
    where = "disk" if (row.streamed_shares or {}).get("nvme") else "link"
    if implied * (1 - rounding(row)) > limit * BANDWIDTH_TOLERANCE:
        return f"faster than its {where}: page cache, or weights kept on the device"
    if implied > limit:
        return f"at its {where}'s limit, within the rounding of what was published"
    if implied < limit / 2 and row.kv_location == "cpu":
        return (
            "the KV cache is on the host too: its traffic, or attention on the CPU, takes the rest "
            "of the time"
        )
    return None


def rounding(row: Published) -> float:
    """Return half a unit of the last digit, as a share: 0.5 for 0.01, 0.013 for 0.38."""
    decimals = len(row.text.partition(".")[2])
    return 0.5 * 10**-decimals / row.value if row.value else 0.0
