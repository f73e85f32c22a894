"""Allocate what a cache holds, count every byte, and order copies with the computation."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field

import torch

from zinfer.machine.memory import host_available_bytes
from zinfer.units import format_bytes


class HostMemoryShort(MemoryError):
    """The KV cache is larger than the host memory that is left."""


@dataclass
class Traffic:
    """Bytes moved between host and device since the last reset.

    Attributes:
        to_host_bytes, to_device_bytes: copied, counted on the side that is written.
        attention_s: seconds that attention on the host took.
        attention_calls: how often it was computed.
        attention_bytes: keys and values that it read.
    """

    to_host_bytes: int = 0
    to_device_bytes: int = 0
    attention_s: float = 0.0
    attention_calls: int = 0
    attention_bytes: int = 0

    def clear(self) -> None:
        """Start counting anew."""
        self.__init__()  # type: ignore[misc]


@dataclass
class Memory:
    """The buffers of one cache.

    Attributes:
        pin: page-lock host buffers, so that copies run beside the computation.
    """

    pin: bool
    host_bytes: int = 0
    device_bytes: int = 0
    traffic: Traffic = field(default_factory=Traffic)

    def host(self, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
        """Return a host buffer.

        Raises:
            HostMemoryShort: there is not that much host memory.
        """
        wanted = torch.Size(shape).numel() * dtype.itemsize
        available = host_available_bytes()
        if available is not None and wanted > available:
            raise HostMemoryShort(
                f"the KV cache wants {format_bytes(wanted)} more host memory after "
                f"{format_bytes(self.host_bytes)}, and {format_bytes(available)} are left. "
                "Try a smaller batch.batch_size, fewer batch.new_tokens, or kv_cache.bits=8"
            )
        self.host_bytes += wanted
        return torch.empty(shape, dtype=dtype, pin_memory=self.pin)

    def staging(self, like: torch.Tensor) -> torch.Tensor:
        """Return a buffer for tokens on their way to places that are not in one piece."""
        return torch.empty(like.shape, dtype=like.dtype, pin_memory=self.pin)

    def device(
        self, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
    ) -> torch.Tensor:
        """Return a device buffer."""
        self.device_bytes += torch.Size(shape).numel() * dtype.itemsize
        return torch.empty(shape, dtype=dtype, device=device)

    def to_host(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return a copy on the host; the tensor itself where it is there already."""
        if tensor.device.type == "cpu":
            return tensor
        self.traffic.to_host_bytes += tensor.numel() * tensor.element_size()
        return tensor.to("cpu")

    def to_device(self, tensor: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Return a copy on the device; the tensor itself where it is there already."""
        if tensor.device == device:
            return tensor
        self.traffic.to_device_bytes += tensor.numel() * tensor.element_size()
        return tensor.to(device)

    def forget(self) -> None:
        """Count no buffer any more: the caller drops them all."""
        self.host_bytes = self.device_bytes = 0


class Lanes:
    """A lane for copies beside the lane that computes; one and the same on a CPU."""

    def __init__(self, device: torch.device) -> None:
        self.parallel = device.type in ("cuda", "xpu")
        self._device = device
        self._copies = torch.Stream(device) if self.parallel else None

    def copying(self) -> contextlib.AbstractContextManager[object]:
        """Run what follows on the copy lane, after all that was computed so far."""
        if self._copies is None:
            return contextlib.nullcontext()
        self._copies.wait_stream(torch.accelerator.current_stream(self._device))
        return self._copies

    def mark(self) -> torch.Event | None:
        """Return a point of the copy lane to wait for."""
        return None if self._copies is None else self._copies.record_event()

    def computed_after(self, mark: torch.Event | None) -> None:
        """Let the computing lane wait for a point of the copy lane."""
        if mark is not None:
            torch.accelerator.current_stream(self._device).wait_event(mark)

    def used_by_copies(self, tensor: torch.Tensor) -> None:
        """Keep the memory of a tensor that the caller drops until the copy lane is done with it."""
        if self._copies is not None:
            tensor.record_stream(self._copies)
