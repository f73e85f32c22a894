"""The DeepSpeed configuration of a run: a pure function of RunConfig and ModelSpec."""

from __future__ import annotations

from typing import Any

from zinfer.config import RunConfig
from zinfer.machine.hardware import Hardware
from zinfer.model.spec import ModelSpec
from zinfer.plan.zero_layout import PAPER_AIO_BLOCK_BYTES, ZeroLayout, aio_block_bytes, zero_layout
from zinfer.units import GIB, format_bytes

Json = dict[str, Any]

PAPER_QUEUE_DEPTH = 64
TUNED_QUEUE_DEPTH = 16
TUNED_INTRA_OP_PARALLELISM = 4
MIN_TUNED_BUFFERS = 5
STAGING_SHARE = 0.25
"""Tuned NVMe buffers take at most this share of the memory that is available for them."""


def derive(config: RunConfig, spec: ModelSpec, hardware: Hardware) -> Json:
    """Return the DeepSpeed configuration of this run on this hardware."""
    return deepspeed_json(config, spec, staging_limit_bytes=staging_limit_bytes(config, hardware))


def staging_limit_bytes(config: RunConfig, hardware: Hardware) -> int | None:
    """Return the bytes that a rank's tuned NVMe buffers may take. None: unknown memory.

    They lock host memory, or with offload.use_gds=true lie in the memory of the rank's device.
    """
    if config.offload.use_gds:
        device = hardware.device_free_bytes or hardware.device_total_bytes
        return None if device is None else int(device * STAGING_SHARE)
    host, locked = hardware.host_available_bytes, hardware.memlock_limit_bytes
    limits = [] if host is None else [int(host * STAGING_SHARE)]
    limits += [] if locked is None else [locked]
    return min(limits) // config.launcher.ranks if limits else None


def deepspeed_json(
    config: RunConfig, spec: ModelSpec, *, staging_limit_bytes: int | None = None
) -> Json:
    """Return the DeepSpeed configuration of this run.

    Args:
        staging_limit_bytes: bytes per rank that tuned NVMe buffers may take. They are
            never fewer than work.
    """
    if config.zero.derivation == "paper":
        return _paper(config, spec)
    return _tuned(config, spec, staging_limit_bytes)


def _paper(config: RunConfig, spec: ModelSpec) -> Json:
    """Return the published derivation, key for key.

    Source: DeepSpeedExamples, inference/huggingface/zero_inference/run_model.py, get_ds_model and
    utils.get_quant_config.
    There `GB` is 1 << 30 and buffer_size counts elements. Quantisation is emitted for 4 bits only;
    8 bits are emitted the same way here, because a run that asks for them must not silently run
    unquantised.
    """
    h = spec.hidden_size
    zero: Json = {
        "stage": 3,
        "stage3_prefetch_bucket_size": 2 * h * h,
        "stage3_param_persistence_threshold": h,
        "stage3_max_live_parameters": 2 * h * h,
    }
    derived: Json = {
        "fp16": {"enabled": spec.dtype == "float16"},
        "bf16": {"enabled": spec.dtype == "bfloat16"},
        "zero_optimization": zero,
        "steps_per_print": 2000,
        "train_batch_size": config.batch.batch_size,
        "wall_clock_breakdown": False,
        **_quantisation(config),
    }
    if config.offload.device == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.offload.pin_memory}
    if config.offload.device == "nvme":
        count, numel = _paper_buffers(spec.model_type, config.offload.use_gds)
        zero["offload_param"] = {
            "device": "nvme",
            "pin_memory": config.offload.pin_memory,
            "nvme_path": config.offload.nvme_path,
            "buffer_count": count,
            "buffer_size": numel,
        }
        derived["aio"] = {
            "block_size": PAPER_AIO_BLOCK_BYTES,
            "queue_depth": PAPER_QUEUE_DEPTH,
            "thread_count": 8,
            "use_gds": config.offload.use_gds,
            "single_submit": False,
            "overlap_events": True,
        }
    return derived


def _paper_buffers(model_type: str, use_gds: bool) -> tuple[int, int]:
    """Return (buffer_count, elements of each) of the published example."""
    if model_type == "bloom":
        return (3, 8 * GIB) if use_gds else (5, 9 * GIB)
    if model_type == "mixtral":
        return 10, 1 * GIB
    return 5, 2 * GIB


def _tuned(config: RunConfig, spec: ModelSpec, staging_limit_bytes: int | None) -> Json:
    """Derive every value from the largest layer and the largest parameter.

    No key that DeepSpeed ignores, no value that corrupts tokens.
    """
    layout = zero_layout(config, spec)
    zero: Json = {
        "stage": 3,
        "stage3_prefetch_bucket_size": _given(
            config.zero.prefetch_bucket_numel, layout.layer_numel
        ),
        "stage3_param_persistence_threshold": _persistence_threshold(config, spec, layout),
        "stage3_max_live_parameters": _given(config.zero.max_live_numel, 2 * layout.layer_numel),
    }
    if config.quantiser != "deepspeed":  # DeepSpeed unpacks its quantised weights there
        zero["memory_efficient_linear"] = (
            False  # it saves memory in training; here it costs time at every product
        )
    if model_is_leaf(config):
        zero["leaf_module"] = {"classes": [spec.architecture]}
    elif leaf_layers(config, spec, staging_limit_bytes):
        zero["leaf_module"] = {"classes": list(spec.layer_classes)}
    derived: Json = {
        "train_micro_batch_size_per_gpu": config.batch.batch_size
        // config.launcher.ranks,  # wanted even to infer
        "zero_optimization": zero,
        **_float_mode(spec.dtype),
        **_quantisation(config),
    }
    if config.offload.device == "cpu":
        zero["offload_param"] = {"device": "cpu", "pin_memory": config.offload.pin_memory}
    if config.offload.device == "nvme":
        numel = _buffer_numel(config, layout)
        zero["offload_param"] = {
            "device": "nvme",
            "pin_memory": config.offload.pin_memory,
            "nvme_path": config.offload.nvme_path,
            "buffer_count": _buffer_count(config, layout, spec, staging_limit_bytes),
            "buffer_size": numel,
        }
        derived["aio"] = {
            "block_size": aio_block_bytes(config),
            "queue_depth": _given(config.zero.aio_queue_depth, TUNED_QUEUE_DEPTH),
            "intra_op_parallelism": _given(
                config.zero.aio_intra_op_parallelism, TUNED_INTRA_OP_PARALLELISM
            ),
            "single_submit": False,
            "overlap_events": True,
            **({"use_gds": True} if config.offload.use_gds else {}),
        }
    return derived


def _given(override: int | None, derived: int) -> int:
    return derived if override is None else override


def _persistence_threshold(config: RunConfig, spec: ModelSpec, layout: ZeroLayout) -> int:
    """Return the threshold in elements; parameters up to it stay gathered.

    That is all of them where it costs no byte. Under NVMe it must stay below every swapped
    partition: else DeepSpeed returns wrong tokens on one rank and crashes on two.
    """
    most = layout.largest_stored_numel if gathers_in_place(config) else spec.hidden_size
    wanted = _given(config.zero.persistence_threshold_numel, most)
    return min(wanted, layout.swap_min_numel - 1) if config.offload.device == "nvme" else wanted


def gathers_in_place(config: RunConfig) -> bool:
    """Tell if a gathered weight is the partition itself, on a processor and on a GPU.

    One rank without offload holds every partition whole, on its device: DeepSpeed makes a view of
    it. Weights that DeepSpeed quantised are unpacked when they are gathered.
    Source: NoGatherHandle in deepspeed/runtime/zero/partition_parameters.py.
    """
    launcher = config.launcher
    alone = launcher.ranks * launcher.nodes == 1
    return alone and config.offload.device == "none" and config.quantiser != "deepspeed"


def model_is_leaf(config: RunConfig) -> bool:
    """Tell if the whole model is one leaf of ZeRO-3, fetched once and never released.

    Then nothing is left of ZeRO-3 in a pass (worker/engines/zero_kept.py). It is so where weights
    are gathered in place, unless a setting of the user's says what is fetched or kept.
    """
    zero = config.zero
    given = zero.leaf_layers is not None or zero.persistence_threshold_numel is not None
    return zero.derivation == "tuned" and gathers_in_place(config) and not given


def leaf_layers(config: RunConfig, spec: ModelSpec, staging_limit_bytes: int | None = None) -> bool:
    """Tell if a decoder layer is one leaf of ZeRO-3: fetched and released as a whole.

    Not where experts are modules of their own (all of them would be fetched, used or not), not for
    quantised weights, and not where the NVMe buffers hold less than a layer.
    """
    if not _leaf_is_wanted(config, spec):
        return False
    if config.zero.leaf_layers or config.offload.device != "nvme":
        return True
    layout = zero_layout(config, spec)
    return _buffer_count(config, layout, spec, staging_limit_bytes) >= min_buffer_count(
        layout, spec, leaf=True
    )


def _leaf_is_wanted(config: RunConfig, spec: ModelSpec) -> bool:
    if config.zero.derivation == "paper" or not spec.layer_classes:
        return False
    if config.zero.leaf_layers is not None:
        return config.zero.leaf_layers
    return config.quantiser != "deepspeed" and not zero_layout(config, spec).separate_experts


def min_buffer_count(layout: ZeroLayout, spec: ModelSpec, *, leaf: bool) -> int:
    """Count the fewest staging buffers that work: those of one module or leaf.

    One more where a tied embedding may hold its own throughout.
    """
    together = max(layout.swapped_per_module, layout.swapped_per_layer if leaf else 0)
    return max(2, together + int(spec.tied_embeddings))


def _buffer_numel(config: RunConfig, layout: ZeroLayout) -> int:
    return _given(
        config.offload.buffer_numel, max(layout.largest_swapped_numel, layout.swap_min_numel)
    )


def _buffer_count(
    config: RunConfig, layout: ZeroLayout, spec: ModelSpec, staging_limit_bytes: int | None
) -> int:
    """Return the given number, else two layers' worth within the limit, never too few to work."""
    if config.offload.buffer_count is not None:
        return config.offload.buffer_count
    least = min_buffer_count(
        layout, spec, leaf=bool(config.zero.leaf_layers) and _leaf_is_wanted(config, spec)
    )
    wanted = max(MIN_TUNED_BUFFERS, 2 * layout.swapped_per_layer, least)
    if staging_limit_bytes is None:
        return wanted
    return max(
        least,
        min(wanted, staging_limit_bytes // (_buffer_numel(config, layout) * layout.itemsize_bytes)),
    )


def _float_mode(dtype: str) -> Json:
    return {"float16": {"fp16": {"enabled": True}}, "bfloat16": {"bf16": {"enabled": True}}}.get(
        dtype, {}
    )


def _quantisation(config: RunConfig) -> Json:
    if config.quantiser != "deepspeed":
        return {}
    scheme = {
        "num_bits": config.dtype.bits,
        "group_size": config.dtype.group_size,
        "group_dim": 1,
        "symmetric": False,
    }
    return {"weight_quantization": {"quantized_initialization": scheme}}


def derivation_warnings(config: RunConfig, spec: ModelSpec) -> list[str]:
    """Warn of values that DeepSpeed ignores, of waste, and of values that had to be changed."""
    layout = zero_layout(config, spec)
    warnings = []
    if config.zero.derivation == "paper" and config.offload.device == "nvme":
        count, numel = _paper_buffers(spec.model_type, config.offload.use_gds)
        staging = count * numel * layout.itemsize_bytes
        warnings.append(
            "zero=paper: DeepSpeed ignores aio.thread_count (it reads intra_op_parallelism), so "
            "reads use one thread"
        )
        if layout.largest_swapped_numel:
            warnings.append(
                f"zero=paper: {count} NVMe buffers of {numel:,} elements page-lock "
                f"{format_bytes(staging)} of host memory; the largest parameter needs "
                f"{layout.largest_swapped_numel:,}. zero=tuned sizes them from the model"
            )
    threshold = config.zero.persistence_threshold_numel
    if (
        threshold is not None
        and config.offload.device == "nvme"
        and threshold >= layout.swap_min_numel
    ):
        warnings.append(
            f"zero.persistence_threshold_numel={threshold} was lowered to "
            f"{layout.swap_min_numel - 1}: from {layout.swap_min_numel} on, parameters would be "
            "both swapped to NVMe and kept, and DeepSpeed returns wrong tokens"
        )
    return warnings
