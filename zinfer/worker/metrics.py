"""Samples -> Metrics. Field names are the metric names everywhere: in MLflow, in JSON, in reports."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, fields

from zinfer.config import BatchConfig
from zinfer.worker.generate import Sample

PERCENTILES = {50: 1, 90: 10, 95: 20, 99: 100}
"""Percentile -> decode steps that it takes: at least one sample above it."""


@dataclass(frozen=True, kw_only=True)
class MemoryUse:
    """What one rank's process used at most; summed over ranks in Metrics, except where the name says otherwise."""

    peak_host_rss_bytes: int
    """Resident set at its highest (VmHWM), everything of the process included."""
    mlocked_bytes: int
    """Page-locked at the end of the run (VmLck)."""
    huge_page_bytes: int | None
    """Of memory without a file, in huge pages at the end of the run (AnonHugePages of /proc/self/smaps_rollup)."""
    nvme_read_bytes: int | None
    """Read from block devices while generating (read_bytes of /proc/self/io); page-cache hits are not in it."""
    peak_device_allocated_bytes: int | None
    peak_device_reserved_bytes: int | None
    """By torch's allocator. None on a device that is host memory."""


@dataclass(frozen=True, kw_only=True)
class Metrics:
    """Medians over the timed generations; spread beside the ones that are compared.

    Definitions follow MLPerf Inference and AIPerf: TTFT is the time to the first new token, TPOT the mean time of the others.
    """

    load_s: float
    """From the start of building the model to an engine that can generate; imports and ops builds are not in it."""
    import_s: float
    first_generate_s: float
    """The first generation of the process, warm-up or not: allocations, op loading and kernel selection are in it."""
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
    """Mean time of the same fixed work of the host's processor, between the timed generations: how fast the machine itself was then."""
    peak_host_rss_bytes: int
    mlocked_bytes: int
    huge_page_bytes: int | None
    nvme_read_bytes: int | None
    peak_device_allocated_bytes: int | None
    peak_device_reserved_bytes: int | None
    weight_bytes: int
    """Of the tensors that hold the weights, all ranks."""
    kv_cache_bytes: int | None
    """Of the tensors in the caches at the end of a generation, all ranks."""

    def known(self) -> dict[str, float]:
        """Name -> value of every number that is known."""
        values = {item.name: getattr(self, item.name) for item in fields(self)}
        return {name: value for name, value in values.items() if value is not None}


def summarise(
    samples: Sequence[Sample],
    batch: BatchConfig,
    *,
    yardstick_s: Sequence[float],
    load_s: float,
    import_s: float,
    memory: Sequence[MemoryUse],
    weight_bytes: int,
    kv_cache_bytes: int | None,
) -> Metrics:
    """Metrics of a run.

    Args:
        samples: of the slowest rank or of rank 0: ranks run in step.
        memory: one for each rank.
    """
    timed = [sample for sample in samples if sample.kind == "timed"]
    prefills = [sample.prefill_s for sample in timed]
    totals = [sample.total_s for sample in timed]
    decodes = [sum(sample.decode_step_s) for sample in timed]
    steps = [step for sample in timed for step in sample.decode_step_s]
    rates = [batch.batch_size * batch.new_tokens / total for total in totals]
    return Metrics(
        load_s=load_s,
        import_s=import_s,
        first_generate_s=samples[0].total_s,
        prefill_s=statistics.median(prefills),
        prefill_s_min=min(prefills),
        prefill_s_max=max(prefills),
        prefill_s_stddev=_stddev(prefills),
        decode_step_s=statistics.median(steps),
        decode_step_s_min=min(steps),
        decode_step_s_max=max(steps),
        decode_step_s_stddev=_stddev(steps),
        decode_step_s_p90=_percentile(steps, 90),
        decode_step_s_p95=_percentile(steps, 95),
        decode_step_s_p99=_percentile(steps, 99),
        total_s=statistics.median(totals),
        total_s_min=min(totals),
        total_s_max=max(totals),
        total_s_stddev=_stddev(totals),
        time_to_first_token_s=statistics.median(prefills),
        time_per_output_token_s=statistics.median(decodes) / (batch.new_tokens - 1),
        generated_tokens_per_s=statistics.median(rates),
        generated_tokens_per_s_min=min(rates),
        generated_tokens_per_s_max=max(rates),
        generated_tokens_per_s_stddev=_stddev(rates),
        decode_tokens_per_s=batch.batch_size * (batch.new_tokens - 1) / statistics.median(decodes),
        prefill_tokens_per_s=batch.batch_size * batch.prompt_tokens / statistics.median(prefills),
        timed_runs=len(timed),
        yardstick_s=statistics.fmean(yardstick_s),
        peak_host_rss_bytes=sum(use.peak_host_rss_bytes for use in memory),
        mlocked_bytes=sum(use.mlocked_bytes for use in memory),
        huge_page_bytes=_total([use.huge_page_bytes for use in memory]),
        nvme_read_bytes=_total([use.nvme_read_bytes for use in memory]),
        peak_device_allocated_bytes=_total([use.peak_device_allocated_bytes for use in memory]),
        peak_device_reserved_bytes=_total([use.peak_device_reserved_bytes for use in memory]),
        weight_bytes=weight_bytes,
        kv_cache_bytes=kv_cache_bytes,
    )


def _stddev(values: Sequence[float]) -> float | None:
    """Sample standard deviation; None of a single value."""
    return statistics.stdev(values) if len(values) > 1 else None


def _percentile(values: Sequence[float], percent: int) -> float | None:
    """Linear interpolation between closest ranks; None with fewer values than the percentile can tell apart."""
    if len(values) < PERCENTILES[percent]:
        return None
    return (
        statistics.quantiles(values, n=100, method="inclusive")[percent - 1]
        if len(values) > 1
        else values[0]
    )


def _total(values: Sequence[int | None]) -> int | None:
    known = [value for value in values if value is not None]
    return sum(known) if len(known) == len(values) else None
