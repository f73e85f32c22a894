"""Name what `task=calibrate` measures of one machine: one row for each kind of measurement.

Every rate is a median. A spread is half the range of the middle half of the samples, over the
median.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True, kw_only=True)
class Rate:
    """Bytes or operations per second."""

    median: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class KernelTime:
    """One measured matrix product: `rows` x K times K x N weights that are in no cache."""

    dtype: str
    rows: int
    weight_numel: int
    """K * N."""
    wide: bool
    """Many more columns than rows of weights, as in an output head."""
    seconds: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class DequantiseTime:
    """Time to unpack one quantised matrix into `dtype`, as DeepSpeed does at each use of it."""

    bits: int
    dtype: str
    weight_numel: int
    seconds: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class PackedTime:
    """One measured product with a packed matrix, by the kernel that dtype.kernel=auto chooses."""

    bits: int
    dtype: str
    """Type of the rows that it is multiplied with."""
    rows: int
    weight_numel: int
    seconds: float
    spread: float
    activation_bits: int = 16
    """As dtype.activation_bits."""


@dataclass(frozen=True, kw_only=True)
class DeviceAttentionTime:
    """Time of one layer's decode attention over a KV cache on the device."""

    dtype: str
    shared_by: int
    """Query heads for each KV head."""
    kv_bytes: int
    """Keys and values of the layer."""
    grow_s: float
    """Copying them into tensors that are one token longer, as transformers' own cache does."""
    attend_s: float
    """Attending to them, where growing has left them."""
    spread: float
    """Of attend_s."""
    slot_s: float | None = None
    """Attending to them in a slot that a copy has filled, token by token, as kv_cache=host does.
    None: not measured, as in calibrations before this was."""


@dataclass(frozen=True, kw_only=True)
class DeviceSeconds:
    """Seconds of one layer's decode attention, of each kind that DeviceAttentionTime has."""

    grow_s: float
    attend_s: float
    slot_s: float


@dataclass(frozen=True, kw_only=True)
class HostAttentionTime:
    """Time of one layer's decode attention over keys and values in host memory."""

    bits: int
    """16 stands for the compute type, whatever its width."""
    dtype: str
    shared_by: int
    """Query heads for each KV head."""
    kv_bytes: int
    """Keys and values as stored, with their scales."""
    seconds: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class PackingTime:
    """Time to pack keys or values of one layer into codes on the processor, or to unpack them."""

    bits: int
    dtype: str
    """Type of the values."""
    values: int
    seconds: float
    spread: float


@dataclass(frozen=True, kw_only=True)
class NvmeRate:
    """Rate of reading or writing one file through DeepSpeed's aio handle."""

    operation: Literal["read", "write"]
    block_bytes: int
    queue_depth: int
    intra_op_parallelism: int
    rate: Rate


@dataclass(frozen=True, kw_only=True)
class FamilyCost:
    """Fixed cost of a decoder layer in plain transformers: all but its products and attention."""

    model_type: str
    """Model family; ANY_FAMILY stands for those that were not measured."""
    dtype: str
    op_s: float
    """Seconds for each operation that a layer starts (ModelSpec.layer_ops)."""
    value_s: float
    """Seconds for each element that its elementwise operations write (ModelSpec.layer_values)."""


@dataclass(frozen=True)
class Mode:
    """Way in which weights are held and fetched, where it decides fixed costs."""

    where: str
    """resident (plain transformers), or ZeRO-3's offload target: none, cpu, nvme."""
    by_module: bool = False
    """ZeRO-3 fetches each module of a layer, not the layer as a whole."""

    def __str__(self) -> str:
        return self.where + (BY_MODULE if self.by_module else "")

    @classmethod
    def read(cls, text: str) -> Mode:
        """Return the mode that a profile stores as this text."""
        return cls(text.removesuffix(BY_MODULE), by_module=text.endswith(BY_MODULE))


@dataclass(frozen=True, kw_only=True)
class ModeCost:
    """Seconds that a mode adds to a forward pass, whatever the model."""

    mode: Mode
    dtype: str
    step_s: float
    """Once: generate's own loop, embedding, final norm, head."""
    layer_s: float
    """For each decoder layer."""
    part_s: float
    """For each parameter of a layer that is fetched whole; by module, for each module of it."""


ANY_FAMILY = "*"
BY_MODULE = ", by module"


@dataclass(frozen=True, kw_only=True)
class LoadCost:
    """Seconds of building a model with random weights in one mode."""

    fixed_s: float
    parameter_s: float
    """For each parameter (a tensor, not an element)."""
    bytes_per_s: float


@dataclass(frozen=True, kw_only=True)
class StreamCost:
    """Cost of reading weights from NVMe while generating, as a whole run shows it."""

    parameter_s: float
    """Wait for each parameter that is read, beside its bytes."""
    bytes_per_s: float
