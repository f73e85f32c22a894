"""RunConfig and its parts: what one run depends on, frozen. They are made by zinfer.config, the only door from YAML to code."""

from __future__ import annotations

import hashlib
import json
from dataclasses import field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict, TypeAdapter
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from zinfer.config.engines import OffloadDevice, engine_kind, engine_names
from zinfer.config.tasks import TASKS

METHOD_VERSION = 1
"""Raised whenever what is timed, or what a metric's name means, changes. Runs of different versions are never compared silently."""

STRICT = ConfigDict(extra="forbid")
QUANTISED_BITS = {"int8": 8, "int4": 4}
ITEMSIZE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

FloatDtype = Literal["float32", "float16", "bfloat16"]


def _known_task(name: str) -> str:
    """Accept the names of TASKS. Raises what a Literal would."""
    if name not in TASKS:
        raise _not_one_of(tuple(TASKS))
    return name


def _known_engine(name: str) -> str:
    """Accept the names of installed engines. Raises what a Literal would."""
    try:
        return engine_kind(name).name
    except KeyError:
        raise _not_one_of(engine_names()) from None


def _not_one_of(choices: tuple[str, ...]) -> PydanticCustomError:
    return PydanticCustomError(
        "literal_error", "not one of {expected}", {"expected": ", ".join(choices)}
    )


class ConfigError(ValueError):
    """What the user typed cannot run. Carries every problem, each with what to type instead; the command ends with exit code 2."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Which model, pinned so that planning and dummy weights need no network."""

    name: str
    hub_id: str | None = None
    tokenizer_id: str | None = None
    source: str | None = None
    """A hub id or a local folder, for model=custom; wins over the pinned architecture."""
    model_type: str | None = None
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoConfig.for_model(model_type, ...)."""
    checkpoint_dtype: str | None = None
    config_source: str | None = None
    trust_remote_code: bool = False
    gguf_file: str | None = None
    allow_pickle: bool = False
    """Pickle checkpoints (pytorch_model.bin) can run code when they are read; only safetensors unless this is true."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OffloadConfig:
    """Where ZeRO-3 keeps the weights between uses."""

    device: OffloadDevice
    nvme_path: str | None = None
    """Directory on a local disk; each job works in a folder of its own under it and deletes that folder in every ending."""
    pin_memory: bool = False
    use_gds: bool = False
    """NVIDIA GPUDirect Storage: NVMe to GPU without the bounce buffer in host memory."""
    buffer_numel: int | None = None
    """Elements per NVMe staging buffer (DeepSpeed's `buffer_size` counts elements too). None: derived from the largest parameter."""
    buffer_count: int | None = None
    huge_pages: bool | None = None
    """NVMe staging buffers lie in huge pages, as far as decoder layers use them. None: except under zero=paper."""

    @property
    def nvme_folder(self) -> Path | None:
        """nvme_path as a path, `~` expanded; None without one."""
        return Path(self.nvme_path).expanduser() if self.nvme_path else None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DtypeConfig:
    """How weights are stored, and in which type the model computes."""

    weights: Literal["auto", "float32", "float16", "bfloat16", "int8", "int4"]
    compute: Literal["auto", "float32", "float16", "bfloat16"]
    """auto: the checkpoint's own type (float16 where its config names none), bfloat16 instead of float16 on a device without it."""
    group_size: int = 64
    """Elements that share one scale and offset; only for int8 and int4."""

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight, None when weights are stored as computed."""
        return QUANTISED_BITS.get(self.weights)

    @property
    def unpacks_to_float16(self) -> bool:
        """Whether quantised weights are (where compute is auto: may be) computed with in float16: a GPU needs DeepSpeed's kernel for it."""
        return self.bits is not None and self.compute in ("auto", "float16")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchConfig:
    """What is generated and how often it is timed. Every row has exactly these lengths; end-of-sequence is ignored."""

    batch_size: int
    """Rows over all ranks."""
    prompt_tokens: int
    new_tokens: int
    warmup: int
    """Generations before timing starts: logged apart, never in the medians."""
    repeats: int
    prompt: Literal["synthetic", "text", "file"] = "synthetic"
    prompt_text: str = "Paris is the capital city of"
    prompt_file: str | None = None
    seed: int = 0


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KvCacheConfig:
    """Where keys and values live."""

    placement: Literal["device"]


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig:
    """How the DeepSpeed JSON is derived from the model. Numbers left None are derived; a number given wins (derivation=tuned only)."""

    derivation: Literal["paper", "tuned"]
    prefetch_bucket_numel: int | None = None
    max_live_numel: int | None = None
    persistence_threshold_numel: int | None = None
    leaf_layers: bool | None = None
    """Whole decoder layers are fetched and released at once instead of one module after the other."""
    aio_block_size_bytes: int | None = None
    aio_queue_depth: int | None = None
    aio_intra_op_parallelism: int | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """What runs the model."""

    name: Annotated[str, AfterValidator(_known_engine)]
    """One of ENGINES, or of another package's entry points."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HardwareConfig:
    """detect: this machine. Otherwise a published box, every number with its source; None where nobody published it."""

    name: str
    source: str | None = None
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    profile: str | None = None
    """Path of a calibration profile; None: the newest one of this machine."""
    device_name: str | None = None
    device_count: int | None = None
    device_bytes: int | None = None
    host_bytes: int | None = None
    host_cores: int | None = None
    disk_bytes: int | None = None
    device_memory_bytes_per_s: float | None = None
    device_flops_per_s: dict[str, float] = field(default_factory=dict)
    """Published dense peak per dtype name."""
    host_memory_bytes_per_s: float | None = None
    host_to_device_bytes_per_s: float | None = None
    nvme_read_bytes_per_s: float | None = None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """Where runs are logged."""

    store: Literal["sqlite", "server", "none"]
    uri: str | None = None
    experiment: str = "zinfer"
    run_name: str | None = None
    tags: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LauncherConfig:
    """How the worker of one job is started (Hydra's own launcher decides where jobs run: hydra/launcher=...)."""

    ranks: int = 1
    """Processes on this host, data-parallel: each generates its share of the batch."""
    nodes: int = 1
    """Hosts that run this job together, each with a zinfer of its own and `ranks` processes."""
    node_rank: int = 0
    """Which of them this is; node 0 has the results."""
    rendezvous: str | None = None
    """host:port of node 0, the same on all nodes."""
    timeout_s: float | None = None
    """The worker is ended, and the run closed as `timeout`, after this many seconds."""
    omp_threads: int | None = None
    """Threads per rank; None: the machine's cores divided by the ranks."""
    master_port: int | None = None
    fork_workers: bool = True
    """Jobs of a sweep are forked from a process that holds the imports; false: each job imports for itself, as a single run does."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig:
    """What the memory plan may do."""

    enforce: bool = True
    """A plan that does not fit refuses the run. false: it warns, so that plans for other hardware can be made anywhere."""
    headroom: float = 0.05
    """Share of each tier that is left free."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """How a multirun behaves."""

    parent_run_id: str | None = None
    resume: bool = True
    """A job whose run is there and FINISHED, with the same configuration, code, hardware and method, is not run again."""
    retry: Literal["failed", "oom", "none"] = "failed"
    """Which jobs that ended badly are run again: all, only those that ran out of memory, or none."""
    fail_fast: bool = False
    """The first job that fails is the last one started."""
    preview: bool = False
    """Print the table of jobs and run nothing."""
    search: Literal["none", "best_batch"] = "none"
    """best_batch: each job becomes a search for the batch size with the highest generated_tokens_per_s, from batch.batch_size upwards."""
    search_max_batch: int = 4096
    search_trials: int = 16
    """At most so many batch sizes are tried."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything one run depends on, checked."""

    task: Annotated[str, AfterValidator(_known_task)]
    """One of TASKS."""
    format: Literal["text", "json"]
    weights: Literal["dummy", "pretrained"]
    model: ModelConfig
    offload: OffloadConfig
    dtype: DtypeConfig
    batch: BatchConfig
    kv_cache: KvCacheConfig
    zero: ZeroConfig
    engine: EngineConfig
    hardware: HardwareConfig
    tracking: TrackingConfig
    launcher: LauncherConfig
    plan: PlanConfig
    sweep: SweepConfig

    @property
    def stages_in_huge_pages(self) -> bool:
        """Whether NVMe staging buffers in host memory are put into huge pages; the published derivation has none."""
        if self.offload.device != "nvme" or self.offload.use_gds:
            return False
        return (
            self.zero.derivation == "tuned"
            if self.offload.huge_pages is None
            else self.offload.huge_pages
        )

    def changed(self, **settings: Any) -> RunConfig:
        """Copy with other settings: `config.changed(batch={"repeats": 5}, weights="dummy")`.

        A mapping changes fields of its group, anything else replaces the setting. Not checked again.
        """
        values = {
            name: replace(getattr(self, name), **value) if isinstance(value, dict) else value
            for name, value in settings.items()
        }
        return replace(self, **values)

    def with_batch(self, rows: int) -> RunConfig:
        """Copy with this batch size, over all ranks."""
        return self.changed(batch={"batch_size": rows})


RUN_CONFIG = TypeAdapter(RunConfig)


def config_to_tree(config: RunConfig) -> dict[str, Any]:
    """Plain JSON-able mapping; `config_from_tree` reads it back."""
    tree = RUN_CONFIG.dump_python(config, mode="json")
    assert isinstance(tree, dict)
    return tree


def config_key(config: RunConfig) -> str:
    """Hash of everything that decides what a run measures; paths, tracking and the terminal do not. 16 hexadecimal digits."""
    tree = config_to_tree(config)
    for group in ("tracking", "sweep", "format", "plan"):
        tree.pop(group)
    tree["offload"].pop("nvme_path")
    for name in ("timeout_s", "master_port", "rendezvous", "node_rank", "fork_workers"):
        tree["launcher"].pop(name)
    tree["hardware"].pop("profile")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
