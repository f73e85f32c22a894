"""The collection of published results, and the bandwidth that each of them implies."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import resources
from typing import Literal

from multirun_analysis.configuration import RATE

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
"""Of the models in the published tables, tied weights once.

A test holds them against what zinfer.model.spec counts from conf/model.
"""
GROUP_SIZE = 64
"""Quantised weights carry a 16-bit scale and a 16-bit offset for each 64 of them.

Source: FlexGen section 5 (arXiv:2303.06865).
"""
SPEED_METRICS = (
    "total_throughput",
    "generation_throughput",
    "generation_throughput_per_gpu",
    "throughput",
    "latency_per_generated_token",
)
"""Published metrics that a measured rate can stand beside."""
DECODE_ONLY = "generation_throughput_per_gpu"
"""The 2022 blog counts the time after the prefill alone, for each GPU.

All others count new tokens over prefill and decode time.
"""
UNCLEAR = "throughput"
"""SGLang's own tool does not say whether it counts prompt tokens, so it implies no time."""


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
        """Reliability of the number, as its notes say."""
        notes = self.notes.lower()
        if "inconsistent" in notes or "do not use" in notes:
            return "inconsistent"
        if "draft" in notes or "draft" in self.source.lower():
            return "draft"
        return "approximate" if "approx" in notes else "as published"

    @property
    def offload(self) -> str | None:
        """offload.device that places weights the same way; None for a mixture."""
        return {"cpu": "cpu", "nvme": "nvme", "gpu": "none"}.get(self.weights_location)

    @property
    def kv_placement(self) -> str | None:
        """kv_cache.placement that keeps the cache in the same place; None for any other.

        All published caches in host memory are attended to by the host's processor.
        """
        return {"gpu": "device", "cpu": "host_attention"}.get(self.kv_location)

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens/s of the box, or of one GPU where the metric says so."""
        if self.value is None or self.metric not in SPEED_METRICS:
            return None
        if self.metric == "latency_per_generated_token":
            return 1000 / self.value
        return self.value

    @property
    def rate_metric(self) -> str:
        """Name of zinfer's metric of the same quantity."""
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
        """Share of the weights read from `cpu` and `nvme` at every pass; None if not published."""
        return streamed_shares(self.weights_location)

    @property
    def streamed_bytes(self) -> float | None:
        """Bytes that all GPUs together read at every pass; None for weights that stay on them."""
        shares = self.streamed_shares
        return (
            None
            if self.weight_bytes is None or not shares
            else self.weight_bytes * sum(shares.values())
        )

    @property
    def implied_bytes_per_s(self) -> float | None:
        """Streamed bytes over the time of one pass, which is batch / (tokens/s).

        Every pass makes one token of each row. With ZeRO-3 over several GPUs each reads its share
        and gets the others' over the GPUs' own link: the bytes of the box stay the same.
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
        """Say why zinfer has no configuration that is the same; None where it has one."""
        reasons = []
        if self.model not in PUBLISHED_PARAMETERS:
            reasons.append("model not in conf/model")
        if self.offload is None:
            reasons.append(
                f"weights on {self.weights_location}"
                if self.weights_location
                else "placement not published"
            )
        if self.kv_placement is None:
            reasons.append(
                f"KV cache on {self.kv_location}"
                if self.kv_location
                else "KV placement not published"
            )
        if self.batch_size is None or self.prompt_tokens is None or self.new_tokens is None:
            reasons.append("batch or lengths not published")
        return "; ".join(reasons) or None


def streamed_shares(location: str) -> Mapping[str, float] | None:
    """Parse a placement: 'cpu' -> {cpu: 1}; 'gpu 12B + nvme 18B' -> {nvme: 0.6}; '' -> None."""
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
    """Return every row of the collection, in its order."""
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
