"""Compare what a run measured with what was predicted for it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from zinfer.machine.profile import NOTICED_SLOWDOWN
from zinfer.plan.prediction import MOVED_OVER, Prediction
from zinfer.plan.tiers import MemoryPlan


def scored(
    metrics: Mapping[str, float], prediction: Prediction, plan: MemoryPlan
) -> dict[str, float]:
    """Compare a run's metrics with its prediction.

    Returns ratios predicted / measured, the fraction of the ceiling, and the implied bandwidth.
    """
    predicted = prediction.metrics(plan)
    pairs = {
        "prediction_ratio_load": ("predicted_load_s", "load_s"),
        "prediction_ratio_prefill": ("predicted_prefill_s", "prefill_s"),
        "prediction_ratio_decode_step": ("predicted_decode_step_s", "decode_step_s"),
        "prediction_ratio_tokens_per_s": (
            "predicted_generated_tokens_per_s",
            "generated_tokens_per_s",
        ),
        "prediction_ratio_peak_host_rss": ("predicted_peak_host_rss_bytes", "peak_host_rss_bytes"),
        "prediction_ratio_peak_device": (
            "predicted_peak_device_bytes",
            "peak_device_allocated_bytes",
        ),
        "prediction_ratio_kv_cache": ("predicted_kv_cache_bytes", "kv_cache_bytes"),
        "ceiling_fraction": ("generated_tokens_per_s", "ceiling_generated_tokens_per_s"),
    }
    both = {**metrics, **predicted}
    ratios = {
        name: both[top] / both[bottom]
        for name, (top, bottom) in pairs.items()
        if top in both and both.get(bottom)
    }
    if prediction.ceiling.streamed_bytes and metrics.get("decode_step_s"):
        ratios["streamed_bytes_per_s"] = (
            prediction.ceiling.streamed_bytes / metrics["decode_step_s"]
        )
    ratios |= effective_rates(metrics, predicted)
    if prediction.yardstick_s and metrics.get("yardstick_s"):
        ratios["slowdown"] = metrics["yardstick_s"] / prediction.yardstick_s
        if "prediction_ratio_tokens_per_s" in ratios:
            ratios["prediction_ratio_tokens_per_s_at_speed"] = (
                ratios["prediction_ratio_tokens_per_s"] / ratios["slowdown"]
            )
    return {**predicted, **ratios}


def effective_rates(
    metrics: Mapping[str, float], predicted: Mapping[str, float]
) -> dict[str, float]:
    """Return the bytes/s over each resource while decoding: bytes of a token times tokens/s.

    The bytes are those measured on the disk, and the plan's elsewhere: nobody counts them there.
    """
    tokens_per_s = metrics.get("decode_tokens_per_s")
    if not tokens_per_s:
        return {}
    bytes_of = {
        name: predicted.get(f"predicted_{name}_bytes_per_token") for name in MOVED_OVER.values()
    }
    if bytes_of["nvme"] and metrics.get("nvme_read_bytes_per_token"):
        bytes_of["nvme"] = metrics["nvme_read_bytes_per_token"]
    return {
        f"effective_{name}_bytes_per_s": count * tokens_per_s
        for name, count in bytes_of.items()
        if count
    }


def speed_warnings(scores: Mapping[str, float]) -> Iterator[str]:
    """Warn where the machine was slower or faster during a run than at its calibration."""
    slowdown = scores.get("slowdown", 1.0)
    if slowdown < 1 / NOTICED_SLOWDOWN:
        yield (
            f"the processor was {1 / slowdown:.1f} times faster while this ran than when it was "
            "calibrated, so predictions are too slow. Run zinfer task=calibrate"
        )
