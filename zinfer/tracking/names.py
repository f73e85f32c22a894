"""Names under which runs are logged in MLflow: run states, tags, metrics and parameters."""

from __future__ import annotations

from zinfer.job.outcome import Status

FINISHED, FAILED, KILLED = "FINISHED", "FAILED", "KILLED"
"""MLflow's own states of a run that has ended."""
RUN_STATUS: dict[Status, str] = {
    "ok": FINISHED,
    "planned": FINISHED,
    "killed": KILLED,
    "timeout": KILLED,
}

RUN_NAME_TAG = "mlflow.runName"
PARENT_TAG = "mlflow.parentRunId"
SOURCE_NAME_TAG, SOURCE_TYPE_TAG = "mlflow.source.name", "mlflow.source.type"
SOURCE_COMMIT_TAG, USER_TAG = "mlflow.source.git.commit", "mlflow.user"
NOTE_TAG = "mlflow.note.content"
"""MLflow's own tags, which its pages show."""

ROLE_TAG = "zinfer.role"
"""job, sweep or plan_grid."""
STATUS_TAG, REASON_TAG, ENDED_BY_TAG = "zinfer.status", "zinfer.reason", "zinfer.ended_by"
ATTEMPT_TAG, JOB_DIR_TAG, SWEEP_DIR_TAG = "zinfer.attempt", "zinfer.job_dir", "zinfer.sweep_dir"
METHOD_TAG, CONFIG_KEY_TAG, KEY_TAG = "zinfer.method_version", "zinfer.config_key", "zinfer.key"
VERSION_TAG, COMMIT_TAG, DIRTY_TAG = "zinfer.version", "zinfer.commit", "zinfer.dirty"
HARDWARE_TAG, DEVICE_TAG, DTYPE_TAG = "zinfer.hardware", "zinfer.device", "zinfer.dtype"
MODEL_TYPE_TAG, QUANTISER_TAG = "zinfer.model_type", "zinfer.quantiser"
BINDING_TAG, WARNINGS_TAG = "zinfer.binding_resource", "zinfer.warnings"
STABILITY_TAG, STABILITY_REASON_TAG = "zinfer.stability", "zinfer.stability_reason"
QUALITY_TAG, QUALITY_REASON_TAG = "zinfer.quality", "zinfer.quality_reason"
PROFILE_TAG = "zinfer.profile"
"""The most expensive operations of a decode step, one a line."""
LINEAR_TAG, LINEAR_REASON_TAG = "zinfer.linear_kernel", "zinfer.linear_kernel_reason"
"""compiled, torch or mixed: what multiplied a few rows with 16-bit weights; and why."""
PACKED_TAG, PACKED_REASON_TAG = "zinfer.packed_kernel", "zinfer.packed_kernel_reason"
"""compiled, triton, torch, unpack or mixed: what multiplied packed weights; and why."""
WEIGHTS_TAG, OVERRIDES_TAG = "zinfer.weights_sha256", "zinfer.overrides"

HEADLINE = "generated_tokens_per_s"
"""The metric that runs are compared by first."""
STEP_METRIC, REPEAT_METRIC = "decode_step_s_by_step", "total_s_by_repeat"
"""Metrics with steps: the median of each decode step, and each timed repeat."""
COMPARED_METRICS = (
    HEADLINE, "decode_tokens_per_s", "prefill_tokens_per_s",
    "prefill_s", "decode_step_s", "decode_step_s_p99", "time_per_output_token_s", "load_s",
    "generated_tokens_per_s_stddev",
    "ceiling_fraction", "ceiling_generated_tokens_per_s",
    "predicted_generated_tokens_per_s", "prediction_ratio_tokens_per_s",
    "streamed_bytes_per_s", "effective_nvme_bytes_per_s", "effective_link_bytes_per_s",
    "energy_j_per_token",
    "peak_device_reserved_bytes", "peak_host_rss_bytes", "weight_stored_bytes", "kv_cache_bytes",
    "plan_device_needed_bytes", "plan_host_needed_bytes", "plan_disk_needed_bytes",
    "host_attention_s",
    "quality_token_agreement", "quality_perplexity", "quality_perplexity_ratio",
    "best_batch_size", "search_trials",
)  # fmt: skip
"""Numbers that runs are compared by, the first first: MLflow's pages begin with it.

Each is a chart and a line of the comparison there. All other numbers are in NUMBERS_TAG.
"""
NUMBERS_TAG = "zinfer.numbers"
"""On a run: its numbers that are no metrics, as a JSON object. With many: zinfer.numbers.1, ...

Constants of the model and details of the measurement; reports read them like metrics.
"""
MODEL_NUMBERS = {
    "model_parameters": "parameters",
    "model_active_parameters": "active_parameters",
    "kv_cache_bytes_per_token": "kv_cache_bytes_per_token",
    "kv_cache_bytes_paper": "kv_cache_bytes_paper",
    "hidden_bytes": "hidden_bytes",
    "kv_cache_bytes": "kv_cache_bytes",
}
"""Name of a number -> key of Outcome.model; a measured value takes its place.

Runs of earlier versions have the first five as parameters or metrics.
"""
PREDICTED_METRICS = ("predicted_", "ceiling_")
"""Beginnings of names of a plan's own numbers: logged also where nothing was measured."""
PLAN_FITS = "plan_fits"
STORED_BYTES = "weight_stored_bytes"
"""Of the weights, all ranks: planned, and measured where a run has loaded them."""
LARGEST_BATCH = "largest_batch_size"
"""That fits; only of jobs that plan and do not run."""
TIER_NUMBERS = ("plan_{tier}_needed_bytes", "plan_{tier}_available_bytes")
NOT_PARAMETERS = frozenset({
    "format", "profile", "tracking", "sweep", "calibrate", "offload.nvme_path",
    "launcher.master_port", "launcher.timeout_s", "batch.prompt_text", "batch.prompt_file",
    "hardware.source", "hardware.profile", "hardware.device_flops_per_s",
    "model.model_type", "model.hub_id", "model.overrides", "model.config_source",
    "model.tokenizer_id", "model.checkpoint_dtype", "model.trust_remote_code",
    "model.allow_pickle",
})  # fmt: skip
"""Settings that are no choices to compare runs by. They are in config.yaml."""


def run_status(status: Status) -> str:
    """Return MLflow's state for a job's status. The tag zinfer.status has the exact one."""
    return RUN_STATUS.get(status, FAILED)
