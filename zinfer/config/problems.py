"""Combinations of settings that cannot run on any machine, each as a sentence that ends with what to type."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from zinfer.config.engines import engine_of

if TYPE_CHECKING:
    from zinfer.config.run_config import RunConfig


def config_problems(config: RunConfig) -> list[str]:
    """Every problem of this configuration."""
    return [
        *_positive_numbers(config),
        *_batch_problems(config),
        *_launcher_problems(config),
        *_offload_problems(config),
        *_weight_problems(config),
        *_tracking(config),
    ]


def _positive_numbers(config: RunConfig) -> list[str]:
    at_least = {
        "batch.batch_size": (config.batch.batch_size, 1),
        "batch.prompt_tokens": (config.batch.prompt_tokens, 1),
        "batch.new_tokens": (config.batch.new_tokens, 2),
        "batch.warmup": (config.batch.warmup, 0),
        "batch.repeats": (config.batch.repeats, 1),
        "dtype.group_size": (config.dtype.group_size, 1),
        "launcher.ranks": (config.launcher.ranks, 1),
        "launcher.nodes": (config.launcher.nodes, 1),
        "sweep.search_max_batch": (config.sweep.search_max_batch, 1),
        "sweep.search_trials": (config.sweep.search_trials, 2),
        "launcher.omp_threads": (config.launcher.omp_threads, 1),
        "offload.buffer_numel": (config.offload.buffer_numel, 1),
        "offload.buffer_count": (config.offload.buffer_count, 2),
        "zero.prefetch_bucket_numel": (config.zero.prefetch_bucket_numel, 0),
        "zero.max_live_numel": (config.zero.max_live_numel, 0),
        "zero.persistence_threshold_numel": (config.zero.persistence_threshold_numel, 0),
        "zero.aio_queue_depth": (config.zero.aio_queue_depth, 1),
        "zero.aio_intra_op_parallelism": (config.zero.aio_intra_op_parallelism, 1),
    }
    problems = [
        f"{name}={value} is too small: at least {least}. Type {name}={max(least, 1)}"
        for name, (value, least) in at_least.items()
        if value is not None and value < least
    ]
    if config.launcher.timeout_s is not None and config.launcher.timeout_s <= 0:
        problems.append(
            f"launcher.timeout_s={config.launcher.timeout_s} is no time at all. Type launcher.timeout_s=3600, or null for none"
        )
    if not 0 <= config.plan.headroom < 1:
        problems.append(
            f"plan.headroom={config.plan.headroom} is no share of memory. Type plan.headroom=0.05"
        )
    return problems


def _batch_problems(config: RunConfig) -> list[str]:
    problems = []
    batch, ranks = config.batch, config.launcher.ranks * config.launcher.nodes
    if ranks >= 1 and batch.batch_size >= 1 and batch.batch_size % ranks:
        fitting = -(-batch.batch_size // ranks) * ranks
        problems.append(
            f"batch.batch_size={batch.batch_size} cannot be split over {_ranks(config)}: "
            f"each rank generates the same number of rows. Type batch.batch_size={fitting}"
        )
    if batch.prompt == "file":
        if batch.prompt_file is None:
            problems.append(
                "batch.prompt=file has no batch.prompt_file. Type batch.prompt_file=/path/to/text.txt"
            )
        elif not Path(batch.prompt_file).is_file():
            problems.append(
                f"batch.prompt_file={batch.prompt_file} is not a file. Type batch.prompt_file=/path/to/text.txt"
            )
    if batch.prompt == "text" and not batch.prompt_text.strip():
        problems.append(
            "batch.prompt=text has an empty batch.prompt_text. Type batch.prompt_text='Paris is the capital city of'"
        )
    return problems


def _ranks(config: RunConfig) -> str:
    launcher = config.launcher
    return f"launcher.ranks={launcher.ranks}" + (
        f" on launcher.nodes={launcher.nodes}" if launcher.nodes > 1 else ""
    )


def _launcher_problems(config: RunConfig) -> list[str]:
    problems, launcher = [], config.launcher
    if not 0 <= launcher.node_rank < max(1, launcher.nodes):
        problems.append(
            f"launcher.node_rank={launcher.node_rank} is not one of the launcher.nodes={launcher.nodes}. "
            "Type launcher.node_rank=0 on the first host, 1 on the second"
        )
    if launcher.nodes > 1 and launcher.rendezvous is None:
        problems.append(
            f"launcher.nodes={launcher.nodes} have no launcher.rendezvous. Type launcher.rendezvous=HOST:29500 on all, HOST being node 0"
        )
    host, _, port = (launcher.rendezvous or "host:1").rpartition(":")
    if not host or not port.isdecimal():
        problems.append(
            f"launcher.rendezvous={launcher.rendezvous} is not host:port. Type launcher.rendezvous=HOST:29500"
        )
    return problems


def _offload_problems(config: RunConfig) -> list[str]:
    problems = []
    offload, block = config.offload, config.zero.aio_block_size_bytes
    if offload.device == "nvme" and not offload.nvme_path:
        problems.append(
            "offload=nvme has no offload.nvme_path. Type offload.nvme_path=/local_nvme, a directory on a local disk "
            "(the default of conf/offload/nvme.yaml is a folder of the job)"
        )
    if offload.use_gds and offload.device != "nvme":
        problems.append(
            f"offload.use_gds=true reads from NVMe, but offload is {offload.device}. Type offload=nvme or offload.use_gds=false"
        )
    engine = engine_of(config)
    if offload.device not in engine.places:
        problems.append(
            f"engine={engine.name} keeps weights on {' or '.join(_place(name) for name in engine.places)}, "
            f"but offload is {offload.device}. Set offload={engine.places[0]} or engine=zero"
        )
    if block is not None and (block < 4096 or block & (block - 1)):
        problems.append(
            f"zero.aio_block_size_bytes={block} is not a power of two of at least 4096: DeepSpeed aborts the process on it. "
            "Type zero.aio_block_size_bytes=1048576"
        )
    if config.zero.derivation == "paper":
        knobs = {
            "zero.prefetch_bucket_numel": config.zero.prefetch_bucket_numel,
            "zero.max_live_numel": config.zero.max_live_numel,
            "zero.persistence_threshold_numel": config.zero.persistence_threshold_numel,
            "zero.leaf_layers": config.zero.leaf_layers,
            "zero.aio_block_size_bytes": block,
            "zero.aio_queue_depth": config.zero.aio_queue_depth,
            "zero.aio_intra_op_parallelism": config.zero.aio_intra_op_parallelism,
            "offload.buffer_numel": offload.buffer_numel,
            "offload.buffer_count": offload.buffer_count,
            "offload.huge_pages": offload.huge_pages,
        }
        problems += [
            f"{name}={value} is set, but zero=paper emits exactly the published values. Type zero=tuned, or drop {name}"
            for name, value in knobs.items()
            if value is not None
        ]
    return problems


def _place(device: str) -> str:
    """Name the tier of a value of `offload` for people."""
    return {"none": "the device", "cpu": "host memory", "nvme": "disk"}.get(device, device)


def _weight_problems(config: RunConfig) -> list[str]:
    problems = []
    dtype, model = config.dtype, config.model
    if dtype.bits is None and dtype.weights != dtype.compute:
        problems.append(
            f"dtype.weights={dtype.weights} and dtype.compute={dtype.compute} differ: only int8 and int4 weights are stored "
            f"in another type than they compute in. Type dtype={dtype.weights}"
        )
    if dtype.bits is not None and dtype.compute == "float32":
        problems.append(
            f"dtype.weights={dtype.weights} computes in 16 bits in DeepSpeed. Type dtype.compute=bfloat16"
        )
    if dtype.bits is not None and not engine_of(config).quantises:
        problems.append(
            f"dtype={dtype.weights} is DeepSpeed's quantisation, engine={config.engine.name} has none. Set engine=zero or dtype=bfloat16"
        )
    if dtype.bits is not None and config.weights == "pretrained":
        problems.append(
            f"dtype={dtype.weights} with weights=pretrained: DeepSpeed cannot load a checkpoint into weights that it quantises at creation "
            "(shape mismatch in transformers 5). Type weights=dummy to measure speed and memory, or dtype=bfloat16 for real weights"
        )
    if model.model_type is None and model.source is None:
        problems.append(
            "model.source is not set. Type model.source=/path/to/a/folder or model.source=HUB/ID, or choose model=opt-125m"
        )
    if config.weights == "pretrained" and model.source is None and model.hub_id is None:
        problems.append(
            f"model={model.name} has no published checkpoint. Type weights=dummy, or model=custom model.source=/path/to/a/folder"
        )
    return problems


def _tracking(config: RunConfig) -> list[str]:
    if config.tracking.store == "server" and not config.tracking.uri:
        return ["tracking=server has no tracking.uri. Type tracking.uri=http://127.0.0.1:5000"]
    return []
