"""Published results beside measured ones, normalised to what each one's hardware allows.

Hardware differs, so tokens/s alone do not compare. Every forward pass of an offloaded model reads every weight over one link; the bytes
of the weights over the time of a pass are the bandwidth that a result implies, and its share of the link's own compares across boxes.
"""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from multirun_analysis.compare import RATE, Configuration
from multirun_analysis.spread import Spread, scaled

Standing = Literal["as published", "approximate", "draft", "inconsistent"]

PUBLISHED_PARAMETERS = {
    "opt-6.7b": 6_658_473_984,
    "opt-30b": 29_974_540_288,
    "opt-66b": 65_719_701_504,
    "opt-175b": 174_604_468_224,
    "bloom-176b": 176_247_271_424,
    "llama-2-70b": 68_976_648_192,
    "llama-3-70b": 70_553_706_496,
    "mixtral-8x22b": 140_620_634_112,
}
"""Of the models in the published tables, tied weights once; equal to what zinfer.model_spec counts from conf/model (tested)."""
GROUP_SIZE = 64
"""Quantised weights carry a 16-bit scale and a 16-bit offset for each 64 of them. Source: FlexGen section 5 (arXiv:2303.06865)."""
SPEED_METRICS = (
    "total_throughput",
    "generation_throughput",
    "generation_throughput_per_gpu",
    "throughput",
    "latency_per_generated_token",
)
"""What a measured rate can stand beside."""
DECODE_ONLY = "generation_throughput_per_gpu"
"""The 2022 blog counts the time after the prefill alone, for each GPU; all others count new tokens over prefill and decode time."""
UNCLEAR = "throughput"
"""SGLang's own tool: whether prompt tokens are counted is not published, so no time of a pass follows from it."""
BANDWIDTH_TOLERANCE = 1.02
"""Published bandwidths have two digits."""
ARRAY_BYTES_PER_S = {"4x Gen4 NVMe": 10e9, "4x Gen5 NVMe": 27e9, "8x Gen5 NVMe": 48e9}
"""Reads from these arrays into GPU memory as the DeepNVMe blog of 2025-06 states them in its text; its result rows name only the array."""


@dataclass(frozen=True, kw_only=True)
class Box:
    """What a published result ran on, as far as somebody published it. Bytes per second."""

    name: str
    """Of conf/hardware."""
    host_to_device_bytes_per_s: float | None
    nvme_read_bytes_per_s: float | None
    source: str


@dataclass(frozen=True, kw_only=True)
class Published:
    """One row of data/published_results.csv."""

    source: str
    table: str
    hardware: str
    framework: str
    model: str
    """Name in conf/model where there is one, else as published."""
    weights_bits: int | None
    weights_location: str
    kv_location: str
    kv_bits: int | None
    batch_size: int | None
    """Per GPU where the metric is per GPU."""
    prompt_tokens: int | None
    new_tokens: int | None
    metric: str
    value: float | None
    """None for OOM and for ranges; `text` has it as published."""
    text: str
    unit: str
    notes: str
    where: str

    @property
    def standing(self) -> Standing:
        """How far the number can be relied on, from its notes."""
        notes = self.notes.lower()
        if "inconsistent" in notes or "do not use" in notes:
            return "inconsistent"
        if "draft" in notes or "draft" in self.source.lower():
            return "draft"
        return "approximate" if "approx" in notes else "as published"

    @property
    def offload(self) -> str | None:
        """offload.device that places weights the same way; None for a mixture that zinfer does not have."""
        return {"cpu": "cpu", "nvme": "nvme", "gpu": "none"}.get(self.weights_location)

    @property
    def kv_placement(self) -> str | None:
        return {"gpu": "device", "cpu": "host"}.get(self.kv_location)

    @property
    def tokens_per_s(self) -> float | None:
        """Of the box, or of one GPU where the metric says so."""
        if self.value is None or self.metric not in SPEED_METRICS:
            return None
        if self.metric == "latency_per_generated_token":
            return 1000 / self.value
        return self.value

    @property
    def rate_metric(self) -> str:
        """The metric of zinfer that is the same quantity."""
        return "decode_tokens_per_s" if self.metric == DECODE_ONLY else RATE

    @property
    def devices(self) -> int:
        """GPUs of the box: '4x V100 32GB' has 4."""
        found = re.match(r"(\d+)x ", self.hardware)
        return int(found[1]) if found else 1

    @property
    def weight_bytes(self) -> int | None:
        """All weights as stored; None for a model that is not in the catalogue."""
        parameters = PUBLISHED_PARAMETERS.get(self.model)
        if parameters is None or self.weights_bits is None:
            return None
        scales = 2 * 2 / GROUP_SIZE if self.weights_bits < 16 else 0.0
        return int(parameters * (self.weights_bits / 8 + scales))

    @property
    def streamed_shares(self) -> Mapping[str, float] | None:
        """Share of the weights that comes from `cpu` and from `nvme` at every pass; None where that is not published."""
        return streamed_shares(self.weights_location)

    @property
    def streamed_bytes(self) -> float | None:
        """From host and disk to the devices at every pass, all GPUs together; None for weights that stay on the device."""
        shares = self.streamed_shares
        return (
            None
            if self.weight_bytes is None or not shares
            else self.weight_bytes * sum(shares.values())
        )

    @property
    def implied_bytes_per_s(self) -> float | None:
        """Streamed bytes over the time of one pass: every pass makes one token of each row, so a pass takes batch / (tokens/s).

        With ZeRO-3 over several GPUs each reads its share and gets the others' over the GPUs' own link: the bytes of the box stay the same.
        """
        if (
            self.streamed_bytes is None
            or self.tokens_per_s is None
            or not self.batch_size
            or self.metric == UNCLEAR
        ):
            return None
        return self.streamed_bytes * self.tokens_per_s / self.batch_size

    @property
    def why_not_comparable(self) -> str | None:
        """Why zinfer has no configuration that is the same; None where it has one."""
        reasons = []
        if self.model not in PUBLISHED_PARAMETERS:
            reasons.append("model not in conf/model")
        if self.offload is None:
            reasons.append(
                f"weights on {self.weights_location}"
                if self.weights_location
                else "placement not published"
            )
        if self.kv_placement == "host":
            reasons.append("needs kv_cache=host")
        elif self.kv_placement is None:
            reasons.append(
                f"KV cache on {self.kv_location}"
                if self.kv_location
                else "KV placement not published"
            )
        if self.batch_size is None or self.prompt_tokens is None or self.new_tokens is None:
            reasons.append("batch or lengths not published")
        return "; ".join(reasons) or None


def streamed_shares(location: str) -> Mapping[str, float] | None:
    """'cpu' -> {cpu: 1}; 'cpu 50% nvme 50%'; 'gpu 12B + nvme 18B' -> {nvme: 0.6}; '' or 'cpu or nvme' -> None."""
    if location in ("cpu", "nvme"):
        return {location: 1.0}
    if location == "gpu":
        return {}
    parts = re.findall(r"(gpu|cpu|nvme) (\d+(?:\.\d+)?)(?:%|B)", location)
    total = sum(float(amount) for _, amount in parts)
    if not total:
        return None
    return {tier: float(amount) / total for tier, amount in parts if tier != "gpu"}


@cache
def read_published() -> tuple[Published, ...]:
    """Every row of the collection, in its order."""
    text = resources.files("multirun_analysis").joinpath("data/published_results.csv").read_text()
    return tuple(_published(row) for row in csv.DictReader(text.splitlines()))


def _published(row: Mapping[str, str]) -> Published:
    return Published(
        source=row["source"],
        table=row["figure_or_table"],
        hardware=row["hardware"],
        framework=row["framework"],
        model=row["model"].lower()
        if row["model"].lower() in PUBLISHED_PARAMETERS
        else row["model"],
        weights_bits=_whole(row["weights_bits"]),
        weights_location=row["weights_location"],
        kv_location=row["kv_location"],
        kv_bits=_whole(row["kv_bits"]),
        batch_size=_whole(row["batch_size"]),
        prompt_tokens=_whole(row["prompt_len"]),
        new_tokens=_whole(row["gen_len"]),
        metric=row["metric"],
        value=_number(row["value"]),
        text=row["value"],
        unit=row["unit"],
        notes=row["notes"],
        where=row["where"],
    )


def _whole(text: str) -> int | None:
    return int(text) if text.isdecimal() else None


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # OOM, or a range such as 4-5
        return None


# Their hardware

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
    """The published box with its bandwidths; None for one that conf/hardware does not have.

    A disk speed in the description itself wins over the file: the same card was published with several disks.
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
    """'CS3040 NVMe 5.6GB/s seq read' -> 5.6e9; '4 NVMe Gen4 (3.25GB/s each)' -> 13e9; '30TB NVMe' -> None."""
    each = re.search(r"(\d+) NVMe[^;]*?\(([\d.]+)GB/s each\)", hardware)
    if each:
        return int(each[1]) * float(each[2]) * 1e9
    stated = re.search(r"(?:NVMe|disk|SSD|RAID0)[^;]*?~?([\d.]+)GB/s", hardware)
    if stated:
        return float(stated[1]) * 1e9
    return next((speed for array, speed in ARRAY_BYTES_PER_S.items() if array in hardware), None)


@cache
def _hardware_file(name: str) -> Mapping[str, object]:
    """conf/hardware/NAME.yaml; empty where there is none."""
    from pathlib import Path

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
    """The most that the published box can stream: each share of the weights over its own path, at the same time.

    Everything crosses the link to the device; what lies on NVMe crosses the disk too. None when a bandwidth that matters is not known.
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
    """What a published number implies about how it was got, where that is not weights streaming at the speed of their path."""
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
        return "the KV cache is on the host too: its traffic, or attention on the CPU, takes the rest of the time"
    return None


def rounding(row: Published) -> float:
    """Half a unit of the last printed digit, as a share of the value: 0.5 for 0.01, 0.013 for 0.38."""
    decimals = len(row.text.partition(".")[2])
    return 0.5 * 10**-decimals / row.value if row.value else 0.0


# Beside ours


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """A published row and what was measured of the same thing."""

    published: Published
    measured: Configuration | None
    rate: Spread | None
    """In the published row's own terms: see Published.rate_metric; of one GPU where the row is."""
    differs: str
    """What is not the same about it; empty for the very same configuration."""
    missing: str | None
    """Why nothing was measured."""

    @property
    def measured_bytes_per_s(self) -> float | None:
        """The same quantity as Published.implied_bytes_per_s: weight bytes x tokens/s / batch, over the same phases."""
        if self.measured is None or self.rate is None or self.measured.offload == "none":
            return None
        size, batch = self.measured.value("weight_bytes"), self.measured.batch_size
        if size is None or not batch:
            return None
        per_device = _ranks(self.measured) if self.published.metric == DECODE_ONLY else 1
        return size * self.rate.median / (batch / per_device)


def _ranks(item: Configuration) -> int:
    return item.number("launcher.ranks") or 1


def relevant(found: Sequence[Configuration]) -> tuple[Published, ...]:
    """Published speeds of the models that were run here, and of the tables that a preset names (published.source, published.table)."""
    models = {item.model for item in found}
    tables = {(item.tag("published.source"), item.tag("published.table")) for item in found} - {
        (None, None)
    }
    return tuple(
        row
        for row in read_published()
        if row.metric in SPEED_METRICS and (row.model in models or _named(row, tables))
    )


def _named(row: Published, tables: Iterable[tuple[str | None, str | None]]) -> bool:
    return any(
        row.source == source and (table is None or row.table == table) for source, table in tables
    )


def compare_published(found: Sequence[Configuration]) -> tuple[Comparison, ...]:
    """Each relevant published row with the measured configuration that comes closest, or why there is none."""
    return tuple(_compare(row, found) for row in relevant(found))


def _compare(row: Published, found: Sequence[Configuration]) -> Comparison:
    same = [
        item
        for item in found
        if item.model == row.model
        and item.weights_bits == row.weights_bits
        and item.offload == row.offload
    ]
    same = [
        item
        for item in same
        if item.choices.get("kv_cache.placement", "device") == row.kv_placement
    ]
    measured = [item for item in same if item.measured]
    if not measured:
        missing = row.why_not_comparable or _attempt(same) or "not run here"
        return Comparison(published=row, measured=None, rate=None, differs="", missing=missing)
    closest = min(measured, key=lambda item: _distance(item, row))
    rate = closest.spread(row.rate_metric)
    if rate is not None and row.metric == DECODE_ONLY:
        rate = scaled(rate, 1 / _ranks(closest))
    return Comparison(
        published=row,
        measured=closest,
        rate=rate,
        differs=", ".join(_differences(closest, row)),
        missing=None,
    )


def _attempt(same: Sequence[Configuration]) -> str | None:
    failed = [item for item in same if item.failed_runs]
    return f"tried here: {failed[-1].status}" if failed else None


def _distance(item: Configuration, row: Published) -> tuple[int, float]:
    """Equal lengths first, then the nearest batch; among equals the faster."""
    lengths = (item.workload != (row.prompt_tokens, row.new_tokens)) + 0
    batch = abs(_row_batch(item, row) - (row.batch_size or 0))
    return lengths, batch - item.rate * 1e-9


def _row_batch(item: Configuration, row: Published) -> int:
    """The measured batch, counted as the published row counts."""
    return (item.batch_size or 0) // (_ranks(item) if row.metric == DECODE_ONLY else 1)


def _differences(item: Configuration, row: Published) -> list[str]:
    found = []
    if _row_batch(item, row) != row.batch_size:
        found.append(f"batch {_row_batch(item, row)} here")
    if item.workload != (row.prompt_tokens, row.new_tokens):
        found.append(f"{item.workload[0]} + {item.workload[1]} tokens here")
    if _ranks(item) != row.devices:
        found.append(f"{_ranks(item)} of {row.devices} devices here")
    return found
