"""Samples -> Metrics. A field's name is the metric's name in MLflow, in JSON and in reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any, TypeVar

from zinfer.config import BatchConfig
from zinfer.worker.energy import Energy
from zinfer.worker.ranks import RankResult
from zinfer.worker.samples import Sample
from zinfer.worker.surroundings import Surroundings

if TYPE_CHECKING:
    from zinfer.model.weights.verified import VerifiedWeights
    from zinfer.worker.kv_cache.session import KvUse
    from zinfer.worker.quantised.choice import PackedChoice
    from zinfer.worker.skinny.choice import LinearChoice

PERCENTILES = {50: 1, 90: 10, 95: 20, 99: 100}
"""Percentile -> how many decode steps it takes: at least one sample above it."""


Number = TypeVar("Number", int, float)


@dataclass(frozen=True, kw_only=True)
class Measured:
    """Everything that a run measured, before it is summarised."""

    samples: tuple[Sample, ...]
    """Rank 0's: ranks run in step."""
    yardstick_s: tuple[float, ...]
    load_s: float
    import_s: float
    ranks: tuple[RankResult, ...]
    threads: int = 1
    """Threads that compute, of all ranks on this host; on a GPU one of each rank launches."""
    surroundings: Surroundings | None = None
    verified: VerifiedWeights | None = None
    linear: LinearChoice | None = None
    """What multiplied a few rows with 16-bit weights; None: PyTorch, without a choice."""
    packed: PackedChoice | None = None
    """What multiplied packed weights; None: there were none of ours."""
    profile: list[dict[str, Any]] | None = None
    """The most expensive operations of a decode step; None where none was profiled."""

    @property
    def totals_s(self) -> list[float]:
        """Time of each timed generation."""
        return [sample.total_s for sample in self.samples if sample.kind == "timed"]


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Medians over the timed generations, with the spread beside the ones that are compared.

    Definitions follow MLPerf Inference and AIPerf: TTFT is the time to the first new token,
    TPOT the mean time of the others.
    """

    load_s: float
    """From the start of building the model to an engine that can generate.

    Imports and builds of ops are not in it.
    """
    import_s: float
    first_generate_s: float
    """The first generation of the process, warm-up or not.

    Allocations, loading of ops and kernel selection are in it.
    """
    prefill_s: float
    prefill_s_min: float
    prefill_s_max: float
    prefill_s_stddev: float | None
    decode_step_s: float
    """Median over all steps of all timed generations."""
    decode_step_s_min: float
    decode_step_s_max: float
    decode_step_s_stddev: float | None
    decode_step_s_p90: float | None
    decode_step_s_p95: float | None
    decode_step_s_p99: float | None
    total_s: float
    total_s_min: float
    total_s_max: float
    total_s_stddev: float | None
    time_to_first_token_s: float
    time_per_output_token_s: float
    """Median over generations of decode time / (new_tokens - 1)."""
    generated_tokens_per_s: float
    """New tokens of all rows over prefill + decode time. Prompt tokens are not counted."""
    generated_tokens_per_s_min: float
    generated_tokens_per_s_max: float
    generated_tokens_per_s_stddev: float | None
    decode_tokens_per_s: float
    prefill_tokens_per_s: float
    timed_runs: int
    yardstick_s: float
    """Mean time of the same fixed work, done between the timed generations.

    It says how fast the machine itself was then.
    """
    peak_host_rss_bytes: int
    mlocked_bytes: int
    huge_page_bytes: int | None
    nvme_read_bytes: int | None
    nvme_read_bytes_per_token: float | None = None
    """Over the new tokens of all rows and all generations, warm-up included."""
    nvme_written_bytes: int | None = None
    """By the whole run, all ranks."""
    nvme_written_bytes_per_token: float | None = None
    """Over the new tokens of all rows and all generations, warm-up included."""
    peak_device_allocated_bytes: int | None
    peak_device_reserved_bytes: int | None
    energy_j_per_token: float | None = None
    """Of the accelerators, or of the host where the CPU computes; everything that ran there."""
    host_energy_j_per_token: float | None = None
    """Of the hosts' sockets and memory, beside the accelerator's."""
    weight_stored_bytes: int
    """Tensors that hold the weights as they are stored, all ranks."""
    bytes_streamed_per_step: float | None = None
    """Weights that ZeRO-3 gathers for one pass over the model, as they are stored, all ranks."""
    kv_cache_bytes: int | None
    """Everything remembered between tokens at the end of a generation, all ranks."""
    kv_host_bytes: int | None
    """The part of it in host memory, all ranks. None: the cache is the device's."""
    kv_device_bytes: int | None
    """Its buffers on the device, all ranks: what is copied back for a layer's turn."""
    kv_pinned_bytes: int | None
    """The part of kv_host_bytes that is page-locked."""
    kv_copied_bytes_per_step: float | None
    """Over the link in a decode step, both ways, all ranks."""
    host_attention_s: float | None
    """Attention on the host in a decode step, the slowest rank."""
    host_attention_bytes_per_s: float | None
    """Keys and values that attention on the host reads, over the time that it takes; all ranks."""

    def known(self) -> dict[str, float]:
        """Map names to values of every number that is known."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def summarise(measured: Measured, batch: BatchConfig) -> Metrics:
    """Summarise the timed generations; warm-up counts in `first_generate_s` only."""
    timed = [sample for sample in measured.samples if sample.kind == "timed"]
    prefills = [sample.prefill_s for sample in timed]
    decodes = [sum(sample.decode_step_s) for sample in timed]
    steps = [step for sample in timed for step in sample.decode_step_s]
    totals = [sample.total_s for sample in timed]
    rates = [batch.batch_size * batch.new_tokens / total for total in totals]
    memory = [rank.memory for rank in measured.ranks]
    tokens = len(measured.samples) * batch.batch_size * batch.new_tokens
    return Metrics(
        load_s=measured.load_s,
        import_s=measured.import_s,
        first_generate_s=measured.samples[0].total_s,
        **_spread("prefill_s", prefills),
        **_spread("decode_step_s", steps),
        decode_step_s_p90=percentile(steps, 90),
        decode_step_s_p95=percentile(steps, 95),
        decode_step_s_p99=percentile(steps, 99),
        **_spread("total_s", totals),
        time_to_first_token_s=statistics.median(prefills),
        time_per_output_token_s=statistics.median(decodes) / (batch.new_tokens - 1),
        **_spread("generated_tokens_per_s", rates),
        decode_tokens_per_s=batch.batch_size * (batch.new_tokens - 1) / statistics.median(decodes),
        prefill_tokens_per_s=batch.batch_size * batch.prompt_tokens / statistics.median(prefills),
        timed_runs=len(timed),
        yardstick_s=statistics.fmean(measured.yardstick_s),
        peak_host_rss_bytes=sum(use.peak_host_rss_bytes for use in memory),
        mlocked_bytes=sum(use.mlocked_bytes for use in memory),
        huge_page_bytes=_total([use.huge_page_bytes for use in memory]),
        nvme_read_bytes=(read := _total([use.nvme_read_bytes for use in memory])),
        nvme_read_bytes_per_token=None if read is None else read / tokens,
        nvme_written_bytes=(written := _total([use.nvme_written_bytes for use in memory])),
        nvme_written_bytes_per_token=None if written is None else written / tokens,
        peak_device_allocated_bytes=_total([use.peak_device_allocated_bytes for use in memory]),
        peak_device_reserved_bytes=_total([use.peak_device_reserved_bytes for use in memory]),
        **energy_numbers(
            [rank.energy for rank in measured.ranks],
            tokens=len(timed) * batch.batch_size * batch.new_tokens,
            on_gpu=memory[0].peak_device_allocated_bytes is not None,
        ),
        weight_stored_bytes=sum(rank.weight_stored_bytes for rank in measured.ranks),
        bytes_streamed_per_step=_total([rank.streamed_bytes_per_step for rank in measured.ranks]),
        kv_cache_bytes=_total([rank.kv_cache_bytes for rank in measured.ranks]),
        **_kv_numbers([rank.kv_use for rank in measured.ranks]),
    )


def energy_numbers(ranks: Sequence[Energy], *, tokens: int, on_gpu: bool) -> dict[str, Any]:
    """Divide the joules of all ranks by the new tokens of all timed generations."""
    device = _total([rank.device_j for rank in ranks]) if on_gpu else None
    host = _total([rank.host_j for rank in ranks])
    main = device if on_gpu else host
    return {
        "energy_j_per_token": None if main is None else main / tokens,
        "host_energy_j_per_token": None if host is None else host / tokens,
    }


def _spread(name: str, values: Sequence[float]) -> dict[str, Any]:
    """Return the median under `name`, and `name`_min, _max and _stddev.

    The standard deviation is that of a sample; None for a single value.
    """
    return {
        name: statistics.median(values),
        f"{name}_min": min(values),
        f"{name}_max": max(values),
        f"{name}_stddev": statistics.stdev(values) if len(values) > 1 else None,
    }


def percentile(values: Sequence[float], percent: int) -> float | None:
    """Interpolate linearly between the closest ranks.

    None with fewer values than the percentile can tell apart.
    """
    if len(values) < PERCENTILES[percent]:
        return None
    if len(values) == 1:
        return values[0]
    return statistics.quantiles(values, n=100, method="inclusive")[percent - 1]


def _kv_numbers(uses: Sequence[KvUse | None]) -> dict[str, Any]:
    """Add up the ranks' caches in host memory; every number is None for caches on the device."""
    known = [use for use in uses if use is not None]
    attention_s = max((use.attention_s_per_step for use in known), default=0.0)
    read = sum(use.read_bytes_per_step for use in known)
    return {
        "kv_host_bytes": sum(use.host_bytes for use in known) if known else None,
        "kv_device_bytes": sum(use.device_bytes for use in known) if known else None,
        "kv_pinned_bytes": sum(use.pinned_bytes for use in known) if known else None,
        "kv_copied_bytes_per_step": sum(use.copied_bytes_per_step for use in known)
        if known
        else None,
        "host_attention_s": attention_s or None,
        "host_attention_bytes_per_s": read / attention_s if attention_s else None,
    }


def _total(values: Sequence[Number | None]) -> Number | None:
    """Sum the values; None if one of them is unknown."""
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
