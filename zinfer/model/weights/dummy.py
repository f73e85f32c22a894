"""Fill a model with random weights, without a checkpoint and without a second copy of it.

Under ZeRO-3 each parameter is filled while the model is built, before it is partitioned, quantised
and swapped out. Values depend on the tensor's name alone: every engine, offload target and number
of ranks computes with the same weights, so their tokens can be compared.
They are never zeros: multiplying by zero can be faster than by data, and zeros compress better.
"""

from __future__ import annotations

import math
import zlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import deepspeed
import torch
from torch.nn.modules.module import register_module_parameter_registration_hook
from transformers import initialization
from transformers.integrations.deepspeed import prevent_arange_dtype_change
from transformers.modeling_utils import set_zero3_state

from zinfer.config import ITEMSIZE_BYTES, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.hf import load_hf_config, model_class
from zinfer.model.spec import ModelSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PretrainedConfig

OFFSETS = 4099
"""Different starting points in the pool; a prime, so that rows of power-of-two length differ."""
POOL_NUMEL = (1 << 20) + OFFSETS
"""Random values that are tiled over all weights; one pool for each standard deviation."""
GAIN = 2.0
"""How much larger a product's outputs are than its inputs, for independent values.

Published models are initialised with 0.02 everywhere. In a small model the layers then add next to
nothing to the embedding, and greedy decoding repeats one token, which proves nothing.
"""
PROGRESS_BYTES = 256 << 20


def stddev(shape: tuple[int, ...]) -> float:
    """Return the spread of a matrix's values: GAIN / sqrt(inputs), rounded to a power of two.

    Rounded, so that a model needs a few pools only. A sum of n products of independent values
    grows with sqrt(n): Glorot and Bengio 2010, section 4.2.1.
    """
    return 2.0 ** round(math.log2(GAIN / math.sqrt(max(1, shape[-1]))))


class DummyFiller:
    """Fills parameters at memory-copy speed from small pools of normal values."""

    def __init__(self, spec: ModelSpec, events: EventLog) -> None:
        self._pools: dict[tuple[torch.dtype, torch.device, float], torch.Tensor] = {}
        self._events = events
        self._total = spec.num_parameters * ITEMSIZE_BYTES[spec.dtype]
        self._scratch: torch.Tensor | None = None
        self._done = self._reported = 0

    def fill(self, name: str, parameter: torch.Tensor) -> None:
        """Write values: normal for matrices, 1 for norm weights, 0 for biases.

        Args:
            name: the tensor's full name in the model.
        """
        if parameter.dim() <= 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.copy_(self._values(name, parameter))
        self._count(parameter)

    def lend(self, name: str, parameter: torch.Tensor, part: range | None = None) -> None:
        """Point the parameter at such values, for weights that are copied elsewhere at once.

        Its own memory is then never touched, which is most of the cost: a page of fresh memory
        costs more than copying it.

        Args:
            part: indices of the first dimension that are made; None: all. The rest is left as it
                comes.
        """
        if parameter.dim() <= 1:
            parameter.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            parameter.data = self._values(name, parameter, part)
        self._count(parameter)

    def _count(self, parameter: torch.Tensor) -> None:
        self._done += parameter.numel() * parameter.element_size()
        if self._done - self._reported >= PROGRESS_BYTES:
            self._reported = self._done
            self._events.progress(min(self._done, self._total), self._total, "bytes")

    def _values(
        self, name: str, parameter: torch.Tensor, part: range | None = None
    ) -> torch.Tensor:
        """Return values of the parameter's shape, valid until the next call.

        They are a window of the pool, or the pool tiled into scratch memory. A value depends on its
        place in the whole weight, so a part has the same values.
        """
        shape = tuple(parameter.shape)
        offset = zlib.crc32(name.encode()) % OFFSETS
        pool = self._pool(parameter.dtype, parameter.device, stddev(shape))[offset:]
        if parameter.numel() <= pool.numel():
            return pool[: parameter.numel()].view(shape)
        flat = self._scratch_of(parameter)[: parameter.numel()]
        each = flat.numel() // shape[0]
        first, last = 0, flat.numel()
        if part is not None:
            first, last = part.start * each, part.stop * each
        for tile in range(first // pool.numel() * pool.numel(), last, pool.numel()):
            begin, end = max(first, tile), min(last, tile + pool.numel())
            flat[begin:end].copy_(pool[begin - tile : end - tile])
        return flat.view(shape)

    def _scratch_of(self, parameter: torch.Tensor) -> torch.Tensor:
        held = self._scratch
        if held is None or held.numel() < parameter.numel() or held.dtype != parameter.dtype:
            held = torch.empty(parameter.numel(), dtype=parameter.dtype, device=parameter.device)
            self._scratch = held
        return held

    def _pool(self, dtype: torch.dtype, device: torch.device, spread: float) -> torch.Tensor:
        key = (dtype, device, spread)
        if key not in self._pools:
            generator = torch.Generator(device="cpu").manual_seed(0)
            values = torch.normal(0.0, spread, (POOL_NUMEL,), generator=generator)
            self._pools[key] = values.to(dtype).to(device)
        return self._pools[key]


class Registrations:
    """Counts a model's parameters in the order in which its constructor registers them."""

    def __init__(self) -> None:
        self.seen: list[torch.nn.Parameter] = []
        self._numbers: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Iterator[None]:
        """Count in this block."""
        handle = register_module_parameter_registration_hook(self._registered)
        try:
            yield
        finally:
            handle.remove()

    def number(self, parameter: torch.nn.Parameter) -> int | None:
        """Return the place of this parameter; None if no module registered it."""
        return self._numbers.get(id(parameter))

    def _registered(self, module: Any, name: str, parameter: torch.nn.Parameter | None) -> None:
        if parameter is not None and id(parameter) not in self._numbers:
            self._numbers[id(parameter)] = len(self.seen)
            self.seen.append(parameter)  # kept alive, so that no other one gets its id


class FutureNames:
    """Tells a parameter's full name while its model is still being built.

    Inside a constructor a module does not know its place in the model, and some modules are thrown
    away again. So the model is built twice: first on the meta device, where it costs nothing, to
    learn which name the n-th registered parameter gets.
    """

    def __init__(self, hf_config: PretrainedConfig) -> None:
        rehearsal = Registrations()
        with rehearsal.counting(), initialization.no_init_weights(), torch.device("meta"):
            model = model_class(hf_config)(hf_config)
        names = {id(parameter): name for name, parameter in model.named_parameters()}
        self._names = [names.get(id(parameter)) for parameter in rehearsal.seen]
        self._shapes = [parameter.shape for parameter in rehearsal.seen]
        self.registrations = Registrations()

    def name(self, own_name: str, parameter: torch.nn.Parameter) -> str:
        """Return the full name, or `own_name` of a parameter that will not be in the model.

        Raises:
            RuntimeError: the model is built in another order than on the meta device.
        """
        number = self.registrations.number(parameter)
        if number is None or number >= len(self._names):
            raise RuntimeError(f"parameter {own_name} was not met on the meta device")
        if self._shapes[number] != parameter.shape:
            raise RuntimeError(
                f"parameter {own_name} is {tuple(parameter.shape)}, "
                f"on the meta device it was {tuple(self._shapes[number])}"
            )
        return self._names[number] or own_name


def _dummy_init(filler: DummyFiller, names: FutureNames, ds_json: dict[str, Any]) -> Any:
    """Return a zero.Init that fills each parameter before it is partitioned and swapped out."""

    class DummyInit(deepspeed.zero.Init):
        @torch.no_grad()
        def _post_init_method(self, module: torch.nn.Module) -> None:
            for name, parameter in module.named_parameters(recurse=False):
                if not hasattr(parameter, "ds_id"):
                    filler.lend(names.name(name, parameter), parameter)
            super()._post_init_method(module)

    return DummyInit(config_dict_or_path=ds_json)


def dummy_model_partitioned(
    model: ModelConfig,
    spec: ModelSpec,
    ds_json: dict[str, Any],
    dtype: torch.dtype,
    events: EventLog,
) -> Any:
    """Build the model with random weights under ZeRO-3.

    An HfDeepSpeedConfig must be alive and the process group initialised.
    """
    hf_config = load_hf_config(model)
    filler, names = DummyFiller(spec, events), FutureNames(hf_config)
    with (
        initialization.no_init_weights(),
        prevent_arange_dtype_change(),
        names.registrations.counting(),
        _dummy_init(filler, names, ds_json),
        set_zero3_state(),
    ):
        built = model_class(hf_config)._from_config(hf_config, dtype=dtype)
    names.registrations.seen.clear()  # modules that were replaced need not live on
    built.tie_weights()
    return built


def dummy_model(
    model: ModelConfig, spec: ModelSpec, dtype: torch.dtype, device: torch.device, events: EventLog
) -> Any:
    """Build the same model with the same values, whole on one device."""
    hf_config = load_hf_config(model)
    filler = DummyFiller(spec, events)
    with initialization.no_init_weights(), torch.device(device):
        built = model_class(hf_config)._from_config(hf_config, dtype=dtype)
    built.tie_weights()
    for name, parameter in built.named_parameters():  # tied ones once, under their first name
        filler.fill(name, parameter.data)
    return built
