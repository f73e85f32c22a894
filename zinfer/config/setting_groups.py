"""Declare the groups of a run's settings, field by field: type, default and bounds of each.

A string below a field is what `zinfer --explain` says of it. RunConfig puts the groups together.
"""

from __future__ import annotations

from dataclasses import field
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, ConfigDict
from pydantic.dataclasses import dataclass
from pydantic_core import PydanticCustomError

from zinfer.config.engines import OffloadDevice, engine_kind, engine_names
from zinfer.config.limits import Limits

STRICT = ConfigDict(extra="forbid", coerce_numbers_to_str=True, defer_build=True)
QUANTISED_BITS = {"int8": 8, "int4": 4}
ITEMSIZE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}

KvPlacementName = Literal["device", "host", "host_attention"]
KvBits = Literal[16, 8, 4]
FloatDtype = Literal["float32", "float16", "bfloat16"]

MOST_ROWS = 1 << 20
MOST_TOKENS = 1 << 24
MOST_NUMEL = 1 << 45
MOST_BYTES = 1 << 60
MOST_RATE = 1e18

Rows = Annotated[int, Limits(1, MOST_ROWS)]
Tokens = Annotated[int, Limits(1, MOST_TOKENS)]
Numel = Annotated[int, Limits(0, MOST_NUMEL)]
Bytes = Annotated[int, Limits(1, MOST_BYTES)]
Rate = Annotated[float, Limits(0, MOST_RATE, above=True)]
Threads = Annotated[int, Limits(1, 1 << 14)]


def _known_engine(name: str) -> str:
    """Accept the names of installed engines. Raises what a Literal would."""
    try:
        return engine_kind(name).name
    except KeyError:
        raise not_one_of(engine_names()) from None
    except Exception as error:  # whatever another package's module raises
        raise PydanticCustomError(
            "zinfer_engine",
            "its package cannot be used: {error}",
            {"error": f"{type(error).__name__}: {error}"},
        ) from error


def not_one_of(choices: tuple[str, ...]) -> PydanticCustomError:
    """Return the error that a Literal of these choices raises."""
    return PydanticCustomError(
        "literal_error", "not one of {expected}", {"expected": ", ".join(choices)}
    )


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ModelConfig:
    """Choose the model, pinned so that planning and dummy weights need no network."""

    name: str
    """Name of the file in conf/model."""
    hub_id: str | None = None
    """The model on the hub: where weights=pretrained comes from."""
    tokenizer_id: str | None = None
    """Hub id of the tokenizer. null: the source's own."""
    source: str | None = None
    """Hub id or local folder, for model=custom; wins over the pinned architecture."""
    model_type: str | None = None
    """Name of the family in transformers, such as `llama`; null: the source's own."""
    overrides: dict[str, Any] = field(default_factory=dict)
    """Arguments of AutoConfig.for_model(model_type, ...)."""
    checkpoint_dtype: str | None = None
    """Type in which the weights were published. dtype=auto computes in it where it can."""
    config_source: str | None = None
    """Where the pinned values of the architecture come from, for people to check."""
    trust_remote_code: bool = False
    """Run Python code that the model's authors put beside it. Only if you trust them."""
    gguf_file: str | None = None
    """Name of a GGUF file in model.source that holds configuration and weights."""
    allow_pickle: bool = False
    """Read pickle checkpoints (pytorch_model.bin) too. Reading one can run code that is in it."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class OffloadConfig:
    """Choose where ZeRO-3 keeps the weights between uses."""

    device: OffloadDevice
    """none: on the device. cpu: in host memory. nvme: on a local disk."""
    nvme_path: str | None = None
    """Directory on a local disk. Each job works in its own folder there, and deletes it."""
    pin_memory: bool = False
    """Page-lock the weights in host memory: copies to a GPU are faster, the memory is taken."""
    use_gds: bool = False
    """NVIDIA GPUDirect Storage: NVMe to GPU without the bounce buffer in host memory."""
    buffer_numel: Annotated[int, Limits(1, MOST_NUMEL)] | None = None
    """Elements, not bytes, of one NVMe staging buffer. null: derived from the largest parameter.

    DeepSpeed calls it `buffer_size` and counts elements too.
    """
    buffer_count: Annotated[int, Limits(2, 1 << 16)] | None = None
    """NVMe staging buffers. null: as many as the layers need."""
    huge_pages: bool | None = None
    """Put the parts of staging buffers that decoder layers use into huge pages.

    null: yes, except under zero=paper.
    """

    @property
    def nvme_folder(self) -> Path | None:
        """nvme_path as a path, `~` expanded; None without one."""
        return Path(self.nvme_path).expanduser() if self.nvme_path else None


@dataclass(frozen=True, kw_only=True, config=STRICT)
class DtypeConfig:
    """Storage of the weights, and the type in which the model computes."""

    weights: Literal["auto", "float32", "float16", "bfloat16", "int8", "int4"]
    """How weights are stored; auto: as the checkpoint's."""
    compute: Literal["auto", "float32", "float16", "bfloat16"]
    """auto: the checkpoint's own type, or float16 where its config names none.

    A device without float16 computes in bfloat16 instead.
    """
    group_size: Literal[32, 64, 128] = 64
    """Values of an input row that share a scale and a minimum. This and the rest: int8 and int4.

    Only `kernel` is of 16-bit weights too.
    """
    symmetric: bool = False
    """Spread the codes evenly around zero, instead of from each group's least to its largest."""
    keep: tuple[str, ...] = ()
    """Weights kept in the compute type, by parts of their names (`lm_head`, `layers.0`, `q_proj`).

    `embeddings` stands for those of tokens, `head` for the output head, whatever it is called.
    Routers, norms, biases and positions are always kept.
    """
    eight_bits: tuple[str, ...] = ("head",)
    """Weights that int4 stores in 8 bits, by parts of their names as in `keep`.

    An embedding that is the output head too is stored once, as the head.
    """
    kernel: Literal["auto", "compiled", "torch", "unpack"] = "auto"
    """Code that multiplies with packed weights and, on a processor, a few rows with 16-bit ones.

    auto: the best one there is; of 16-bit weights the faster one, measured as the run starts.
    compiled: our C++ kernel. torch: PyTorch's own. unpack: make a plain matrix of packed weights.
    """
    rounding: Literal["nearest", "searched"] = "nearest"
    """Search of each group's scale. nearest: from its least and largest value, no search."""
    activation_bits: Literal["auto", 16, 8] = "auto"
    """Bits of the activations that the compiled kernel multiplies packed weights with.

    16: one scale for sixteen groups. 8: one for each group; faster with AVX-512 VNNI, less exact.
    auto: 8 for int4 with rounding=nearest, which costs far more than that, and 16 otherwise.
    """

    @property
    def bits(self) -> int | None:
        """Bits of a quantised weight; None when weights are stored as computed."""
        return QUANTISED_BITS.get(self.weights)

    @property
    def product_bits(self) -> Literal[16, 8]:
        """Bits of the activations in products with packed weights; see `activation_bits`."""
        if self.activation_bits == "auto":
            return 8 if self.bits == 4 and self.rounding == "nearest" else 16
        return self.activation_bits

    @property
    def unpacks_to_float16(self) -> bool:
        """True when quantised weights may be computed with in float16.

        On a GPU DeepSpeed needs a kernel for that. compute=auto may become float16, so it counts.
        """
        return self.bits is not None and self.compute in ("auto", "float16")


@dataclass(frozen=True, kw_only=True, config=STRICT)
class BatchConfig:
    """Rows, tokens and prompts that are generated, and how often that is timed.

    Every row has exactly these lengths; end-of-sequence tokens are ignored.
    """

    batch_size: Rows
    """Rows over all ranks."""
    prompt_tokens: Tokens
    """Tokens of each row that are read before the first new one."""
    new_tokens: Annotated[int, Limits(2, MOST_TOKENS)]
    """At least 2: the first comes from the prefill, the others from decode steps."""
    warmup: Annotated[int, Limits(0, 1 << 16)]
    """Generations before timing starts: logged apart, never in the medians."""
    repeats: Annotated[int, Limits(1, 1 << 16)]
    """Timed generations."""
    max_repeats: Annotated[int, Limits(1, 1 << 16)] | None = None
    """Go on after `repeats` until the median is known to target_relative_error; null: do not."""
    target_relative_error: Annotated[float, Limits(0.0001, 0.9999)] = 0.05
    """Half of the median's 95 % interval over the median."""
    prompt: Literal["synthetic", "text", "file"] = "synthetic"
    """synthetic: random tokens. text: prompt_text, repeated. file: prompt_file."""
    prompt_text: str = "Paris is the capital city of"
    """The text of prompt=text, repeated until it is long enough."""
    prompt_file: str | None = None
    """A file of plain text for prompt=file; each row has its own part of it."""
    seed: Annotated[int, Limits(0, (1 << 63) - 1)] = 0
    """Of random weights and prompts."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class KvCacheConfig:
    """Choose where keys and values live, and in how many bits."""

    placement: KvPlacementName
    """device: transformers' own cache. host: in host memory, each layer copied back for its turn.

    host_attention: in host memory for good; the query goes there and the output returns.
    """
    bits: KvBits = 16
    """16: as computed, in whatever type that is. 8 and 4: codes with a scale for each group."""
    key_bits: KvBits | None = None
    """Bits of keys alone, which suffer first; null: as `bits`."""
    value_bits: KvBits | None = None
    """Bits of values alone; null: as `bits`."""
    group_size: Annotated[int, Limits(16, 1 << 10)] = 64
    """Values along the head dimension that share a scale and a minimum."""
    pin_memory: bool | None = None
    """Page-lock the host's part, so that copies run beside the computation. null: on a GPU."""
    kernel: Literal["auto", "compiled", "torch"] = "auto"
    """Code of attention on the host: our C++ kernel, or PyTorch. auto: the first if it can."""
    device_layers: Annotated[int, Limits(0, 1 << 16)] = 0
    """So many layers, from the first, keep their cache on the device."""

    @property
    def bits_of_keys(self) -> int:
        """Bits in which keys are stored."""
        return self.key_bits or self.bits

    @property
    def bits_of_values(self) -> int:
        """Bits in which values are stored."""
        return self.value_bits or self.bits

    @property
    def is_offloaded(self) -> bool:
        """True when the cache is in host memory."""
        return self.placement != "device"


@dataclass(frozen=True, kw_only=True, config=STRICT)
class ZeroConfig:
    """Rules that derive the DeepSpeed JSON from the model.

    A number that is left out is derived; a number given wins (derivation=tuned only).
    """

    derivation: Literal["paper", "tuned"]
    """tuned: from the largest layer and parameter of the model. paper: as published."""
    prefetch_bucket_numel: Numel | None = None
    """Elements that are fetched ahead."""
    max_live_numel: Numel | None = None
    """Elements that are on the device at once."""
    persistence_threshold_numel: Numel | None = None
    """Parameters of up to so many elements stay gathered."""
    leaf_layers: bool | None = None
    """Fetch and release whole decoder layers at once, not one module after the other.

    null: also the whole model as one, where one rank has all weights on its device.
    """
    aio_block_size_bytes: Annotated[int, Limits(1, 1 << 40)] | None = None
    """Bytes of one disk request: a power of two."""
    aio_queue_depth: Annotated[int, Limits(1, 1 << 20)] | None = None
    """Disk requests under way at once."""
    aio_intra_op_parallelism: Threads | None = None
    """Threads of one NVMe read."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class EngineConfig:
    """Choose the software that runs the model."""

    name: Annotated[str, AfterValidator(_known_engine)]
    """One of ENGINES, or of another package's entry points."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class HardwareConfig:
    """Describe the machine that is planned for.

    name=detect: this one. Otherwise a published box, every number with its source; null where
    nobody published it.
    """

    name: str
    """detect: this machine. Else the name of a published box."""
    source: str | None = None
    """Where the numbers of a published box come from."""
    accelerator: Literal["auto", "cpu", "cuda"] = "auto"
    """Where the model computes. auto: on a GPU where there is one."""
    profile: str | None = None
    """Path of a calibration profile; null: the newest one of this machine."""
    device_name: str | None = None
    """Name of the GPU."""
    device_count: Annotated[int, Limits(0, 1 << 14)] | None = None
    """GPUs of the box."""
    device_bytes: Bytes | None = None
    """Memory of one GPU."""
    host_bytes: Bytes | None = None
    """Host memory."""
    host_cores: Annotated[int, Limits(1, 1 << 16)] | None = None
    """Cores that processes may use."""
    disk_bytes: Annotated[int, Limits(0, MOST_BYTES)] | None = None
    """Free space for swapped weights."""
    device_memory_bytes_per_s: Rate | None = None
    """Rate of the device's own memory."""
    device_flops_per_s: dict[str, Rate] = field(default_factory=dict)
    """Published dense peak per dtype name."""
    host_memory_bytes_per_s: Rate | None = None
    """Rate of host memory."""
    host_to_device_bytes_per_s: Rate | None = None
    """Rate of the link from host memory to the device, one direction."""
    nvme_read_bytes_per_s: Rate | None = None
    """Rate of sequential reads from the disk."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class TrackingConfig:
    """Choose where runs are logged."""

    store: Literal["auto", "sqlite", "server", "none"]
    """auto: the store of MLFLOW_TRACKING_URI where that is set, else sqlite."""
    uri: str | None = None
    """Address of the store: http://host:5000, sqlite:////path/mlflow.db; null: the choice's own."""
    timeout_s: Annotated[float, Limits(0, 1e9, above=True)] = 60.0
    """A store that takes longer for one step is not waited for; the run is left to task=upload."""
    experiment: str = "zinfer"
    """Name of the experiment in MLflow."""
    run_name: str | None = None
    """Name of the run; null: the model and what was chosen."""
    tags: dict[str, str] = field(default_factory=dict)
    """Tags of your own: tracking.tags.team=red."""
    system_metrics: bool = False
    """Sample processors, memory, disk, network and GPUs of the whole machine while the job runs."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class LauncherConfig:
    """Start of one job's worker. Hydra's own launcher (hydra/launcher=...) decides where."""

    ranks: Annotated[int, Limits(1, 1 << 10)] = 1
    """Processes on this host, data-parallel: each generates its share of the batch."""
    nodes: Annotated[int, Limits(1, 1 << 14)] = 1
    """Hosts that run this job together, each with a zinfer of its own and `ranks` processes."""
    node_rank: Annotated[int, Limits(0, 1 << 14)] = 0
    """Number of this host among them; node 0 has the results."""
    rendezvous: str | None = None
    """host:port of node 0, the same on all nodes."""
    timeout_s: Annotated[float, Limits(0, 1e9, above=True)] | None = None
    """End the worker, and close the run as `timeout`, after this many seconds."""
    stall_s: Annotated[float, Limits(0, 1e9, above=True)] | None = 600.0
    """The same after this many seconds without a token, a disk access or processor time.

    For offload=nvme only, whose reads can stop for good. null: wait for ever.
    """
    omp_threads: Threads | None = None
    """Threads per rank; null: the machine's cores divided by the ranks."""
    master_port: Annotated[int, Limits(1, 65535)] | None = None
    """Port at which the ranks of one host meet; null: a free one."""
    fork_workers: bool = True
    """Fork the jobs of a sweep from a process that holds the imports.

    false: each job imports for itself, as a single run does.
    """


@dataclass(frozen=True, kw_only=True, config=STRICT)
class PlanConfig:
    """Strictness of the memory plan."""

    enforce: bool = True
    """Refuse a run that does not fit. false: warn, so that plans for other machines can be made."""
    headroom: Annotated[float, Limits(0, 0.99)] = 0.05
    """Share of each tier that is left free."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class SweepConfig:
    """Behaviour of a multirun."""

    parent_run_id: str | None = None
    """Run in MLflow that this sweep is a part of."""
    resume: bool = True
    """Reuse a finished run of the same configuration, code, hardware and method."""
    retry: Literal["failed", "oom", "none"] = "failed"
    """Which jobs that ended badly are run again: all, only those out of memory, or none."""
    reuse_disturbed: bool = False
    """Reuse runs, too, that the machine disturbed while they were measured."""
    fail_fast: bool = False
    """Start no more jobs after the first that fails."""
    report: bool = True
    """Write the report when the sweep ends, and put it beside the sweep's run."""
    preview: bool = False
    """Print the table of jobs and run nothing."""
    search: Literal["none", "best_batch"] = "none"
    """best_batch: each job looks for the batch size with the highest generated_tokens_per_s.

    The search goes upwards from batch.batch_size.
    """
    objective: str = "generated_tokens_per_s"
    """The metric that a sweeper such as Optuna is told of each job."""
    search_max_batch: Rows = 4096
    """Try no batch larger than this."""
    search_trials: Annotated[int, Limits(2, 1 << 10)] = 16
    """Try at most so many batch sizes."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class CalibrateConfig:
    """Time that task=calibrate may take."""

    budget_s: Annotated[float, Limits(0, 1e9, above=True)] | None = None
    """Measure what matters most for this machine in so many seconds. null: measure everything."""


@dataclass(frozen=True, kw_only=True, config=STRICT)
class QualityConfig:
    """Scoring of a run's text against the unquantised model, and what is good enough."""

    enabled: Literal[True, False, "auto"] = False
    """Score after the timed generations; only for weights=pretrained.

    auto: where that is possible and takes no more than a minute or so, else say why not.
    """
    tokens: Annotated[int, Limits(64, 1 << 16)] = 2048
    """Tokens of the text that is read. Half of them are decoded, eight rows side by side."""
    min_agreement: Annotated[float, Limits(0, 1)] = 0.9
    """Least share of tokens for which both models' likeliest token is the same."""
    max_perplexity_ratio: Annotated[float, Limits(0, 1e6, above=True)] = 1.05
    """Largest perplexity, over the unquantised model's."""
