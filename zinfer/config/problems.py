"""Find combinations of settings that cannot run on any machine.

Single numbers are bounded where they are declared (limits.py). Each problem here is a sentence that
ends with the override to set, and names the settings that it is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from zinfer.config.engines import engine_of
from zinfer.paths import given_file
from zinfer.redact import redact

if TYPE_CHECKING:
    from zinfer.config.run_config import RunConfig

PLACES = {"none": "the device", "cpu": "host memory", "nvme": "disk"}
"""Value of `offload` -> the tier in words."""
STORES = ("file", "sqlite", "postgresql", "mysql", "mssql", "http", "https", "databricks", "uc")
"""Kinds of MLflow's own stores; a database may name its driver behind a plus sign.

Source: mlflow/tracking/_tracking_service/utils.py, _register_tracking_stores.
"""


@dataclass(frozen=True)
class Problem:
    """One reason why a configuration cannot run."""

    text: str
    about: tuple[str, ...]
    """Settings that it depends on, by dotted name."""


def config_problems(config: RunConfig) -> list[Problem]:
    """Collect every problem of this configuration."""
    checks = (
        _engine,
        _batch,
        _launcher,
        _offload,
        _paper,
        _dtype,
        _kv_cache,
        _model,
        _quality,
        _tracking,
    )
    return [problem for check in checks for problem in check(config)]


def _engine(config: RunConfig) -> Iterator[Problem]:
    """List settings that the engine cannot do, by its row of ENGINES."""
    engine, offload, dtype = engine_of(config), config.offload.device, config.dtype
    if offload not in engine.places:
        places = " or ".join(PLACES[place] for place in engine.places)
        yield Problem(
            f"engine={engine.name} keeps weights on {places}, but offload is {offload}. "
            f"Set offload={engine.places[0]} or engine=zero",
            ("engine.name", "offload.device"),
        )
    if dtype.bits is not None and not engine.quantises:
        yield Problem(
            f"dtype={dtype.weights}: engine={engine.name} has no quantised weights. "
            "Set engine=zero or dtype=bfloat16",
            ("engine.name", "dtype.weights"),
        )
    if "zero" not in engine.options:
        for name, value in _zero_knobs(config).items():
            if value is not None:
                yield Problem(
                    f"{name}={value} is set, but engine={engine.name} does not read it. "
                    f"Set engine=zero, or drop {name}",
                    ("engine.name", name),
                )


def _batch(config: RunConfig) -> Iterator[Problem]:
    batch, launcher = config.batch, config.launcher
    ranks = launcher.ranks * launcher.nodes
    if batch.batch_size % ranks:
        fitting = -(-batch.batch_size // ranks) * ranks
        hosts = f" on launcher.nodes={launcher.nodes}" if launcher.nodes > 1 else ""
        yield Problem(
            f"batch.batch_size={batch.batch_size} cannot be split over "
            f"launcher.ranks={launcher.ranks}{hosts}: each rank generates the same number of rows. "
            f"Set batch.batch_size={fitting}",
            ("batch.batch_size", "launcher.ranks", "launcher.nodes"),
        )
    if batch.max_repeats is not None and batch.max_repeats < batch.repeats:
        yield Problem(
            f"batch.max_repeats={batch.max_repeats} is less than batch.repeats={batch.repeats}. "
            f"Set batch.max_repeats={10 * batch.repeats}",
            ("batch.max_repeats", "batch.repeats"),
        )
    about = ("batch.prompt", "batch.prompt_file")
    example = "Set batch.prompt_file=/path/to/text.txt"
    if batch.prompt == "file" and batch.prompt_file is None:
        yield Problem(f"batch.prompt=file has no batch.prompt_file. {example}", about)
    elif batch.prompt == "file" and not given_file(str(batch.prompt_file)).is_file():
        yield Problem(f"batch.prompt_file={batch.prompt_file} is not a file. {example}", about)
    if batch.prompt == "text" and not batch.prompt_text.strip():
        yield Problem(
            "batch.prompt=text has an empty batch.prompt_text. "
            "Set batch.prompt_text='Paris is the capital city of'",
            ("batch.prompt", "batch.prompt_text"),
        )


def _launcher(config: RunConfig) -> Iterator[Problem]:
    launcher = config.launcher
    if launcher.node_rank >= launcher.nodes:
        yield Problem(
            f"launcher.node_rank={launcher.node_rank} is not one of the "
            f"launcher.nodes={launcher.nodes}. "
            "Set launcher.node_rank=0 on the first host, 1 on the second",
            ("launcher.node_rank", "launcher.nodes"),
        )
    if launcher.nodes > 1 and launcher.rendezvous is None:
        yield Problem(
            f"launcher.nodes={launcher.nodes} have no launcher.rendezvous. "
            "Set launcher.rendezvous=HOST:29500 on all, HOST being node 0",
            ("launcher.nodes", "launcher.rendezvous"),
        )
    host, _, port = (launcher.rendezvous or "host:1").rpartition(":")
    if not host or not port.isdecimal():
        yield Problem(
            f"launcher.rendezvous={launcher.rendezvous} is not host:port. "
            "Set launcher.rendezvous=HOST:29500",
            ("launcher.rendezvous",),
        )


def _offload(config: RunConfig) -> Iterator[Problem]:
    offload, block = config.offload, config.zero.aio_block_size_bytes
    if offload.device == "nvme" and not offload.nvme_path:
        yield Problem(
            "offload=nvme has no offload.nvme_path. "
            "Set offload.nvme_path=/local_nvme, a directory on a local disk "
            "(the default of conf/offload/nvme.yaml is a folder of the job)",
            ("offload.device", "offload.nvme_path"),
        )
    if offload.use_gds and offload.device != "nvme":
        yield Problem(
            f"offload.use_gds=true reads from NVMe, but offload is {offload.device}. "
            "Set offload=nvme or offload.use_gds=false",
            ("offload.use_gds", "offload.device"),
        )
    if block is not None and (block < 4096 or block & (block - 1)):
        yield Problem(
            f"zero.aio_block_size_bytes={block} is not a power of two of at least 4096: "
            "DeepSpeed aborts the process on it. Set zero.aio_block_size_bytes=1048576",
            ("zero.aio_block_size_bytes",),
        )


def _paper(config: RunConfig) -> Iterator[Problem]:
    """Allow no change in zero=paper, which reproduces published values."""
    if config.zero.derivation != "paper":
        return
    offload = config.offload
    knobs = {
        **_zero_knobs(config),
        "offload.buffer_numel": offload.buffer_numel,
        "offload.buffer_count": offload.buffer_count,
        "offload.huge_pages": offload.huge_pages,
    }
    for name, value in knobs.items():
        if value is not None:
            yield Problem(
                f"{name}={value} is set, but zero=paper emits exactly the published values. "
                f"Set zero=tuned, or drop {name}",
                ("zero.derivation", name),
            )


def _zero_knobs(config: RunConfig) -> dict[str, int | bool | None]:
    zero = config.zero
    return {
        "zero.prefetch_bucket_numel": zero.prefetch_bucket_numel,
        "zero.max_live_numel": zero.max_live_numel,
        "zero.persistence_threshold_numel": zero.persistence_threshold_numel,
        "zero.leaf_layers": zero.leaf_layers,
        "zero.aio_block_size_bytes": zero.aio_block_size_bytes,
        "zero.aio_queue_depth": zero.aio_queue_depth,
        "zero.aio_intra_op_parallelism": zero.aio_intra_op_parallelism,
    }


def _dtype(config: RunConfig) -> Iterator[Problem]:
    dtype = config.dtype
    if dtype.bits is None and dtype.weights != dtype.compute:
        yield Problem(
            f"dtype.weights={dtype.weights} and dtype.compute={dtype.compute} differ: only int8 "
            "and int4 weights are stored in another type than they compute in. "
            f"Set dtype={dtype.weights}",
            ("dtype.weights", "dtype.compute"),
        )
    if dtype.bits is None:
        yield from _kernel_of_plain_weights(config)
    elif dtype.activation_bits == 8 and dtype.kernel in ("torch", "unpack"):
        yield Problem(
            f"dtype.activation_bits={dtype.activation_bits} is of the compiled kernel, and "
            f"dtype.kernel={dtype.kernel} does not round activations. Set dtype.kernel=auto",
            ("dtype.activation_bits", "dtype.kernel"),
        )
    if config.quantiser == "deepspeed":
        yield from _quantised_by_deepspeed(config)
    elif dtype.bits is not None and dtype.rounding == "searched":
        yield from _searched(config)


def _kernel_of_plain_weights(config: RunConfig) -> Iterator[Problem]:
    """List values of dtype.kernel that weights as they are computed with do not have."""
    dtype = config.dtype
    if dtype.kernel == "unpack":
        yield Problem(
            f"dtype.kernel=unpack unpacks packed weights, and dtype={dtype.weights} packs none. "
            "Set dtype.kernel=torch, or dtype=int8",
            ("dtype.kernel", "dtype.weights"),
        )
    if dtype.kernel == "compiled" and not config.chooses_products:
        why = (
            "the compiled kernel multiplies 16-bit and packed weights, and dtype is float32"
            if dtype.compute == "float32"
            else f"zero=paper and engine={config.engine.name} are baselines of PyTorch's products"
        )
        yield Problem(
            f"dtype.kernel=compiled: {why}. Set dtype.kernel=auto",
            ("dtype.kernel", "dtype.compute", "engine.name", "zero.derivation"),
        )


def _searched(config: RunConfig) -> Iterator[Problem]:
    """List what the search of codes cannot read."""
    if config.weights == "dummy":
        yield Problem(
            "dtype.rounding=searched fits weights to what a text makes of them, and weights=dummy "
            "are random. Set weights=pretrained, or dtype.rounding=nearest",
            ("dtype.rounding", "weights"),
        )
    if config.model.gguf_file:
        yield Problem(
            f"dtype.rounding=searched reads safetensors, model.gguf_file={config.model.gguf_file} "
            "is none. Set dtype.rounding=nearest",
            ("dtype.rounding", "model.gguf_file"),
        )


def _quantised_by_deepspeed(config: RunConfig) -> Iterator[Problem]:
    """List what DeepSpeed's quantized_initialization cannot do: zero=paper uses it."""
    dtype = config.dtype
    if dtype.compute == "float32":
        yield Problem(
            f"dtype.weights={dtype.weights} computes in 16 bits in DeepSpeed. "
            "Set dtype.compute=bfloat16 or zero=tuned",
            ("dtype.weights", "dtype.compute", "zero.derivation"),
        )
    if config.weights == "pretrained":
        yield Problem(
            f"dtype={dtype.weights} with weights=pretrained and zero=paper: DeepSpeed cannot load "
            "a checkpoint into weights that it quantises at creation (shape mismatch in "
            "transformers 5). Set zero=tuned, which loads it, or weights=dummy",
            ("dtype.weights", "weights", "zero.derivation"),
        )
    settings = {
        "dtype.symmetric": dtype.symmetric,
        "dtype.keep": bool(dtype.keep),
        "dtype.kernel": dtype.kernel != "auto",
        "dtype.rounding": dtype.rounding != "nearest",
        "dtype.activation_bits": dtype.activation_bits != "auto",
    }
    for name in (name for name, is_set in settings.items() if is_set):
        yield Problem(
            f"{name} is set, but zero=paper leaves quantising to DeepSpeed, which does not read "
            f"it. Set zero=tuned, or drop {name}",
            ("dtype.weights", "zero.derivation", name),
        )


def _kv_cache(config: RunConfig) -> Iterator[Problem]:
    kv, engine = config.kv_cache, engine_of(config)
    if kv.placement not in engine.kv_placements:
        yield Problem(
            f"kv_cache={kv.placement}: engine={engine.name} keeps its KV cache on "
            f"{' or '.join(engine.kv_placements)}. Set kv_cache=device or engine=zero",
            ("engine.name", "kv_cache.placement"),
        )
    if kv.is_offloaded:
        return
    knobs = {
        "kv_cache.bits": kv.bits != 16,
        "kv_cache.key_bits": kv.key_bits is not None,
        "kv_cache.value_bits": kv.value_bits is not None,
        "kv_cache.group_size": kv.group_size != 64,
        "kv_cache.device_layers": kv.device_layers != 0,
        "kv_cache.pin_memory": kv.pin_memory is not None,
        "kv_cache.kernel": kv.kernel != "auto",
    }
    for name in (name for name, is_set in knobs.items() if is_set):
        yield Problem(
            f"{name} is set, but kv_cache=device is transformers' own cache, which does not read "
            f"it. Set kv_cache=host_attention or kv_cache=host, or drop {name}",
            ("kv_cache.placement", name),
        )


def _model(config: RunConfig) -> Iterator[Problem]:
    if not config.model.name.strip():
        yield Problem(
            "model.name is empty: tables and logs would name no model. Set model.name=my-model",
            ("model.name",),
        )
    model = config.model
    if model.model_type is None and model.source is None:
        yield Problem(
            "model.source is not set. Set model.source=/path/to/a/folder or model.source=HUB/ID, "
            "or choose model=opt-125m",
            ("model.source", "model.model_type"),
        )
    elif config.weights == "pretrained" and model.source is None and model.hub_id is None:
        yield Problem(
            f"model={model.name} has no published checkpoint. "
            "Set weights=dummy, or model=custom model.source=/path/to/a/folder",
            ("model.source", "model.hub_id", "weights"),
        )


def _quality(config: RunConfig) -> Iterator[Problem]:
    if config.quality.enabled is True and config.weights == "dummy":
        yield Problem(
            "quality.enabled=true scores the text that the model expects, and weights=dummy are "
            "random: their text means nothing. Set weights=pretrained, or quality.enabled=false",
            ("quality.enabled", "weights"),
        )


def _tracking(config: RunConfig) -> Iterator[Problem]:
    tracking = config.tracking
    if tracking.store == "server" and not tracking.uri:
        yield Problem(
            "tracking=server has no tracking.uri. Set tracking.uri=http://127.0.0.1:5000",
            ("tracking.store", "tracking.uri"),
        )
    if not tracking.experiment.strip():
        yield Problem(
            "tracking.experiment is empty. Set tracking.experiment=zinfer",
            ("tracking.experiment",),
        )
    if tracking.uri is not None:
        yield from _store(tracking.uri)


def _store(uri: str) -> Iterator[Problem]:
    scheme = urlsplit(uri).scheme
    if not scheme and given_file(uri).is_file():
        yield Problem(
            f"tracking.uri={redact(uri)} is a file, and a path without a scheme names a folder of "
            f"runs. If it is a database, set tracking.uri=sqlite:///{redact(uri)}",
            ("tracking.uri",),
        )
    if not scheme or _is_store(scheme):
        return
    host = redact(urlsplit(uri if "://" in uri else f"//{uri}").netloc)
    yield Problem(
        f"tracking.uri={redact(uri)}: MLflow has no store of kind {scheme}, only "
        f"{', '.join(STORES)}. Set tracking.uri=http://{host} or tracking=sqlite",
        ("tracking.uri",),
    )


def _is_store(scheme: str) -> bool:
    """Tell if MLflow, or a plugin of it that is installed here, stores runs under this scheme."""
    if scheme.partition("+")[0].removeprefix("databricks-") in STORES:
        return True
    import importlib.metadata  # slow to import, and rarely needed

    plugins = importlib.metadata.entry_points(group="mlflow.tracking_store")
    return scheme in {plugin.name for plugin in plugins}
