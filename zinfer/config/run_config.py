"""Hold every setting of one run, frozen, in the groups of setting_groups.py.

`zinfer.config.parse_config` makes them; behind it nobody sees Hydra's tree. conf/config.yaml shows
the same defaults to people; a test says that both agree. Copies are made with `changed` and
`with_batch`.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import field, replace
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, TypeAdapter
from pydantic.dataclasses import dataclass

from zinfer.config.engines import engine_kind
from zinfer.config.setting_groups import (
    STRICT,
    BatchConfig,
    CalibrateConfig,
    DtypeConfig,
    EngineConfig,
    HardwareConfig,
    KvCacheConfig,
    LauncherConfig,
    ModelConfig,
    OffloadConfig,
    PlanConfig,
    QualityConfig,
    SweepConfig,
    TrackingConfig,
    ZeroConfig,
    not_one_of,
)
from zinfer.config.tasks import TASKS

METHOD_VERSION = 1
"""Raised whenever what is timed, or what a metric's name means, changes.

Runs of different versions are never compared silently.
"""


def _known_task(name: str) -> str:
    """Accept the names of TASKS. Raises what a Literal would."""
    if name not in TASKS:
        raise not_one_of(tuple(TASKS))
    return name


class ConfigError(ValueError):
    """Say that the user's settings cannot run: every problem, each with the override to set."""

    def __init__(self, problems: list[str]) -> None:
        super().__init__("\n".join(problems))
        self.problems = problems

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.problems,)


@dataclass(frozen=True, kw_only=True, config=STRICT)
class RunConfig:
    """Everything one run depends on, checked."""

    task: Annotated[str, AfterValidator(_known_task)]
    """One of TASKS."""
    format: Literal["text", "json"]
    """text: for people. json: one document on stdout."""
    weights: Literal["dummy", "pretrained"]
    """dummy: random, no download. pretrained: those of the hub or a local folder."""
    profile: bool = False
    """Trace one decode step after the timing, and name its most expensive operations."""
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
    calibrate: CalibrateConfig = field(default_factory=CalibrateConfig)
    quality: QualityConfig = field(default_factory=QualityConfig)
    from_environment: dict[tuple[str | int, ...], str] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Not a setting: path of a value -> its text with `${oc.env:...}`, to store or show."""

    @property
    def stages_in_huge_pages(self) -> bool:
        """True when NVMe staging buffers in host memory are put into huge pages.

        The published derivation (zero=paper) has none.
        """
        if self.offload.device != "nvme" or self.offload.use_gds:
            return False
        if self.offload.huge_pages is None:
            return self.zero.derivation == "tuned"
        return self.offload.huge_pages

    @property
    def may_be_scored(self) -> bool:
        """Tell if the run's text is compared with the unquantised model's.

        Random weights never are: their text means nothing.
        """
        return bool(self.quality.enabled) and self.weights == "pretrained"

    @property
    def quantiser(self) -> Literal["deepspeed", "zinfer"] | None:
        """Name whose code packs and unpacks the weights. None: they are not quantised.

        zero=paper reproduces the published example, which uses DeepSpeed's.
        """
        if self.dtype.bits is None:
            return None
        is_paper = engine_kind(self.engine.name).zero3 and self.zero.derivation == "paper"
        return "deepspeed" if is_paper else "zinfer"

    @property
    def chooses_products(self) -> bool:
        """Tell if 16-bit weights may be multiplied by our kernel, on a processor.

        engine=resident and zero=paper are what runs are compared with: PyTorch's products alone.
        """
        kind = engine_kind(self.engine.name)
        is_paper = kind.zero3 and self.zero.derivation == "paper"
        return kind.chooses_products and not is_paper and self.dtype.compute != "float32"

    def changed(self, **settings: Any) -> RunConfig:
        """Copy with other settings: `config.changed(batch={"repeats": 5}, weights="dummy")`.

        A mapping changes fields of its group, anything else replaces the setting. Nothing is
        checked again.
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
    """Turn a configuration into plain JSON values; `config_from_tree` reads them back."""
    tree = RUN_CONFIG.dump_python(config, mode="json", exclude={"from_environment"})
    assert isinstance(tree, dict)
    return tree


def config_key(config: RunConfig) -> str:
    """Hash all that decides what a run measures, to 16 hexadecimal digits.

    Paths, tracking and how results are shown decide nothing and are left out.
    """
    tree = config_to_tree(config)
    for group in ("tracking", "sweep", "format", "plan", "calibrate"):
        tree.pop(group)
    if not config.may_be_scored:
        tree.pop("quality")
    if config.dtype.bits is None:
        for name in ("symmetric", "keep", "eight_bits", "rounding", "activation_bits"):
            tree["dtype"].pop(name)
        if config.dtype.kernel == "auto":
            tree["dtype"].pop("kernel")
    elif config.dtype.activation_bits == "auto":
        tree["dtype"].pop("activation_bits")
    if not tree["profile"]:
        tree.pop("profile")
    tree["offload"].pop("nvme_path")
    for name in ("timeout_s", "stall_s", "master_port", "rendezvous", "node_rank", "fork_workers"):
        tree["launcher"].pop(name)
    tree["hardware"].pop("profile")
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:16]
