"""Random weights without a checkpoint, filled while the model is built, so that no copy of it exists beside the offloaded one.

Never zeros: multiplications by zero can be faster and compress better than data, and then "measured" is not what a real model does.
The n-th parameter of a shape gets the same values under every engine, offload target and number of ranks, so tokens can be compared.
"""

from __future__ import annotations

import zlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

import deepspeed
import torch
from transformers import initialization
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.modeling_utils import set_zero3_state

from zinfer.config import ITEMSIZE_BYTES, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.hf import load_hf_config, model_class
from zinfer.model.spec import ModelSpec

OFFSETS = 4099
"""Different starting points in the pool; a prime, so that rows of power-of-two length do not repeat."""
POOL_NUMEL = (1 << 22) + OFFSETS
"""Random values that are tiled over all weights."""
STDDEV = 0.02
"""initializer_range of GPT-2, OPT and LLaMA configurations."""
PROGRESS_BYTES = 256 << 20


class DummyFiller:
    """Fills parameters at memory-copy speed from one small pool of normal values per dtype and device."""

    def __init__(self, spec: ModelSpec, events: EventLog) -> None:
        self._pools: dict[tuple[torch.dtype, torch.device], torch.Tensor] = {}
        self._events = events
        self._total = spec.num_parameters * ITEMSIZE_BYTES[spec.dtype]
        self._seen: Counter[tuple[int, ...]] = Counter()
        self._scratch: torch.Tensor | None = None
        self._done = self._reported = 0

    def fill(self, name: str, parameter: torch.Tensor) -> None:
        """Write values into the parameter: normal for matrices, 1 for norm weights, 0 for biases, as in a freshly initialised model."""
        if parameter.dim() <= 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.copy_(self._values(parameter))
        self._count(parameter)

    def lend(self, name: str, parameter: torch.Tensor) -> None:
        """Point the parameter at such values instead of writing them: for weights that are copied elsewhere at once.

        Its own memory is then never touched, which is most of the cost: a page of fresh memory costs more than copying it.
        """
        if parameter.dim() <= 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.data = self._values(parameter)
        self._count(parameter)

    def _count(self, parameter: torch.Tensor) -> None:
        self._done += parameter.numel() * parameter.element_size()
        if self._done - self._reported >= PROGRESS_BYTES:
            self._reported = self._done
            self._events.progress(min(self._done, self._total), self._total, "bytes")

    def _values(self, parameter: torch.Tensor) -> torch.Tensor:
        """Values of the parameter's shape, valid until the next call: a window of the pool, or the pool tiled into scratch memory."""
        shape = tuple(parameter.shape)
        offset = zlib.crc32(repr((shape, self._seen[shape])).encode()) % OFFSETS
        self._seen[shape] += 1
        pool = self._pool(parameter.dtype, parameter.device)[offset:]
        if parameter.numel() <= pool.numel():
            return pool[: parameter.numel()].view(shape)
        if (
            self._scratch is None
            or self._scratch.numel() < parameter.numel()
            or self._scratch.dtype != parameter.dtype
        ):
            self._scratch = torch.empty(
                parameter.numel(), dtype=parameter.dtype, device=parameter.device
            )
        flat = self._scratch[: parameter.numel()]
        for start in range(0, flat.numel(), pool.numel()):
            part = flat[start : start + pool.numel()]
            part.copy_(pool[: part.numel()])
        return flat.view(shape)

    def _pool(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        key = (dtype, device)
        if key not in self._pools:
            generator = torch.Generator(device="cpu").manual_seed(0)
            self._pools[key] = (
                torch.normal(0.0, STDDEV, (POOL_NUMEL,), generator=generator).to(dtype).to(device)
            )
        return self._pools[key]


def _dummy_init(filler: DummyFiller, ds_json: dict[str, Any]) -> Any:
    """zero.Init that fills each parameter before it is partitioned, quantised and swapped out."""

    class DummyInit(deepspeed.zero.Init):
        @torch.no_grad()
        def _post_init_method(self, module: torch.nn.Module) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if not hasattr(parameter, "ds_id"):
                    filler.lend(name, parameter)
            super()._post_init_method(module)

    return DummyInit(config_dict_or_path=ds_json)


def dummy_model_partitioned(
    model: ModelConfig,
    spec: ModelSpec,
    ds_json: dict[str, Any],
    dtype: torch.dtype,
    events: EventLog,
) -> Any:
    """The model with random weights under ZeRO-3. An HfDeepSpeedConfig must be alive and the process group initialised."""
    hf_config = load_hf_config(model)
    filler = DummyFiller(spec, events)
    with (
        initialization.no_init_weights(),
        prevent_arange_dtype_change(),
        _dummy_init(filler, ds_json),
        set_zero3_state(),
    ):
        built = model_class(hf_config)._from_config(hf_config, dtype=dtype)
    built.tie_weights()
    return built


def dummy_model(
    model: ModelConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, events: EventLog
) -> Any:
    """The same model with the same values, whole on one device."""
    hf_config = load_hf_config(model)
    filler = DummyFiller(spec, events)
    with initialization.no_init_weights(), torch.device(device):
        built = model_class(hf_config)._from_config(hf_config, dtype=dtype)
    built.tie_weights()
    filled = set()
    for module in _in_order_of_construction(built):
        for name, parameter in module.named_parameters(recurse=False):
            if parameter not in filled:
                filler.fill(name, parameter.data)
                filled.add(parameter)
    return built


def _in_order_of_construction(module: torch.nn.Module) -> Iterator[torch.nn.Module]:
    """Children before their parent: the order in which zero.Init sees modules finished."""
    for child in module.children():
        yield from _in_order_of_construction(child)
    yield module
