"""Say once what each engine is; configuration checks, driver, worker and plan ask this table.

A new engine is one module with `load(config, spec, deepspeed, events) -> Engine` and one row:
here, or in another package that offers the row as an entry point of the group `zinfer.engines`.
docs/extending.md shows both.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from zinfer.config.tasks import function_named

if TYPE_CHECKING:
    from collections.abc import Callable

    from zinfer.config.run_config import RunConfig

ENTRY_POINTS = "zinfer.engines"
"""Entry point group; each entry point is an `EngineKind`, its name is the engine's."""

OffloadDevice = Literal["none", "cpu", "nvme"]
OptionGroup = Literal["zero", "offload"]


@dataclass(frozen=True, kw_only=True)
class EngineKind:
    """One value of `engine.name`, and what the engine can do. The row itself imports nothing."""

    name: str
    summary: str
    """One line for people who choose an engine."""
    load: str
    """`module:function` of its load function; the worker imports it, nobody else."""
    zero3: bool = False
    """DeepSpeed ZeRO-3: weights are partitioned and gathered, and there is a DeepSpeed JSON."""
    loads_ops: bool = False
    """It loads DeepSpeed's compiled ops."""
    offloads_to: tuple[OffloadDevice, ...] = ()
    """Values of `offload` besides none: where it can keep weights that are not in use."""
    quantises: bool = False
    """It takes dtype=int8 and dtype=int4."""
    chooses_products: bool = False
    """On a processor it may multiply 16-bit weights by our kernel where that is faster."""
    kv_placements: tuple[str, ...] = ("device",)
    """Values of `kv_cache` that it takes. Its model must be transformers' for the others."""
    options: tuple[OptionGroup, ...] = ()
    """Groups of settings that it reads; a value set in another of them is refused."""

    @property
    def places(self) -> tuple[OffloadDevice, ...]:
        """All values of `offload` that this engine takes."""
        return ("none", *self.offloads_to)


ENGINES = {
    engine.name: engine
    for engine in (
        EngineKind(
            name="zero",
            summary="DeepSpeed ZeRO-3, which keeps weights on any tier and gathers them for use",
            load="zinfer.worker.engines.zero:load",
            zero3=True,
            loads_ops=True,
            offloads_to=("cpu", "nvme"),
            quantises=True,
            chooses_products=True,
            kv_placements=("device", "host", "host_attention"),
            options=("zero", "offload"),
        ),
        EngineKind(
            name="resident",
            summary="plain transformers, all weights on the device: the baseline",
            load="zinfer.worker.engines.resident:load",
            quantises=True,
            kv_placements=("device", "host", "host_attention"),
        ),
    )
}


def engine_of(config: RunConfig) -> EngineKind:
    """Look up the row of this configuration's engine."""
    return engine_kind(config.engine.name)


def engine_kind(name: str) -> EngineKind:
    """Look up an engine by name: one of ours, else another package's.

    Raises:
        KeyError: there is no such engine.
    """
    if name in ENGINES:
        return ENGINES[name]
    from importlib import metadata

    for entry_point in metadata.entry_points(group=ENTRY_POINTS, name=name):
        kind = entry_point.load()
        if not isinstance(kind, EngineKind):
            raise TypeError(f"entry point {entry_point.value} of {ENTRY_POINTS} is no EngineKind")
        return kind
    raise KeyError(name)


def engine_names() -> tuple[str, ...]:
    """List all engines that are installed: ours first, then those of other packages."""
    from importlib import metadata

    others = {entry_point.name for entry_point in metadata.entry_points(group=ENTRY_POINTS)}
    return (*ENGINES, *sorted(others - ENGINES.keys()))


def engine_loader(config: RunConfig) -> Callable[..., Any]:
    """Import the engine's load function. Only a worker may: this imports torch."""
    return function_named(engine_of(config).load)
