"""A second device on a machine without one: a tensor here refuses to meet a host tensor.

`DeviceTensor` says that it lives on another device, while a CPU tensor holds its data. An operator
that mixes it with a host tensor of any size raises, as CUDA would. Copies between the two are
counted in bytes.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_map
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

_setup_privateuseone_for_python_backend("simdev")
DEVICE = torch.device("simdev", 0)
COPIES = {"copy_", "_to_copy", "_copy_from", "_copy_from_and_resize"}
MOVED = {"to_host": 0, "to_device": 0}
"""Bytes that were copied since they were last set to 0."""


class DeviceTensor(torch.Tensor):
    """A tensor on the simulated device."""

    data_on_cpu: torch.Tensor

    @staticmethod
    def __new__(cls, data: torch.Tensor) -> DeviceTensor:
        made = torch.Tensor._make_wrapper_subclass(
            cls,
            data.shape,
            strides=data.stride(),
            storage_offset=data.storage_offset(),
            dtype=data.dtype,
            layout=data.layout,
            device=DEVICE,
            requires_grad=False,
        )
        made.data_on_cpu = data
        return made

    def __repr__(self) -> str:
        return f"DeviceTensor({self.data_on_cpu})"

    def tolist(self) -> Any:
        """Read the values, as a copy to the host would."""
        return self.data_on_cpu.tolist()

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind.__name__ == "HostKeysOrValues" for kind in types):
            return NotImplemented
        with torch._C.DisableTorchFunctionSubclass():
            if func is torch.nn.functional.scaled_dot_product_attention:
                return on_device(func, args, kwargs)
            return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return on_device(func, args, kwargs or {})


def is_simulated(device: Any) -> bool:
    """Tell whether this names the simulated device."""
    return device is not None and torch.device(device).type == DEVICE.type


def on_device(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> Any:
    """Run an operator on the data behind device tensors.

    Raises:
        RuntimeError: a host tensor takes part in it, and it is no copy.
    """
    name = getattr(func, "__name__", str(func)).split(".")[0]
    flat, _ = tree_flatten((args, kwargs))
    ours = [value for value in flat if isinstance(value, DeviceTensor)]
    hosts = [
        value
        for value in flat
        if isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor) and value.dim()
    ]
    if ours and hosts and name not in COPIES:
        shapes = [tuple(value.shape) for value in (*ours, *hosts)]
        raise RuntimeError(f"{name} mixes tensors of the device and of the host: {shapes}")
    result_on_device = bool(ours)
    named = dict(kwargs)
    if named.get("device") is not None:
        result_on_device = is_simulated(named["device"])
        named["device"] = torch.device("cpu")
    if name == "_to_copy":
        _count(
            isinstance(args[0], DeviceTensor),
            result_on_device,
            args[0].numel() * args[0].element_size(),
        )
    if name == "copy_":
        into, source = args[0], args[1]
        result_on_device = isinstance(into, DeviceTensor)
        _count(
            isinstance(source, DeviceTensor), result_on_device, source.numel() * into.element_size()
        )
    plain, named = tree_map(_data, args), tree_map(_data, named)
    if name == "histc" and not plain[0].is_floating_point():
        return DeviceTensor(func(plain[0].float(), *plain[1:], **named).to(plain[0].dtype))
    result = func(*plain, **named)
    if name.endswith("_") and not name.endswith("__") and isinstance(args[0], torch.Tensor):
        return args[0]
    if kwargs.get("out") is not None:
        return kwargs["out"]
    return tree_map(_simulated, result) if result_on_device else result


def _count(from_device: bool, to_device: bool, size_bytes: int) -> None:
    if from_device != to_device:
        MOVED["to_device" if to_device else "to_host"] += size_bytes


def _data(value: Any) -> Any:
    return value.data_on_cpu if isinstance(value, DeviceTensor) else value


def _simulated(value: Any) -> Any:
    plain = isinstance(value, torch.Tensor) and not isinstance(value, DeviceTensor)
    return DeviceTensor(value) if plain else value


class _Operators(TorchDispatchMode):
    """Catches operators that only name the device, such as torch.zeros(device=...)."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        flat, _ = tree_flatten((args, kwargs))
        if any(isinstance(value, DeviceTensor) for value in flat) or is_simulated(
            kwargs.get("device")
        ):
            return on_device(func, args, kwargs)
        return func(*args, **kwargs)


class _Factories(TorchFunctionMode):
    """Catches torch.tensor(..., device=...) and its like, which no operator stands for."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        factories = (torch.tensor, torch.as_tensor, torch.scalar_tensor)
        if func in factories and is_simulated(kwargs.get("device")):
            return DeviceTensor(
                func(*(_data(value) for value in args), **{**kwargs, "device": "cpu"})
            )
        return func(*args, **kwargs)


@contextlib.contextmanager
def two_devices() -> Iterator[None]:
    """Let the simulated device exist for the time of the block."""
    with _Operators(), _Factories():
        yield


def move_to_device(model: torch.nn.Module) -> None:
    """Move parameters and buffers to the simulated device; tied ones stay tied."""
    moved: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in list(module._parameters.items()):
            if parameter is not None:
                made = torch.nn.Parameter(DeviceTensor(parameter.data), requires_grad=False)
                module._parameters[name] = moved.setdefault(id(parameter), made)
        for name, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[name] = DeviceTensor(buffer)
