"""Round a checkpoint's weights, layer by layer, for the inputs that a short text gives them.

The text runs through the model once. Each decoder layer is read when the text reaches it. Its
weights are rounded for the inputs seen there; then the text runs through the rounded layer, so that
the next one is rounded for what it will meet. Only one layer is in memory at a time, in float32.
Experts of one tensor are rounded for the inputs of all of them; what lies between their two
products is not seen, so the second is rounded for the weights' own sake.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch

from zinfer.config import ConfigError, DtypeConfig
from zinfer.job.events import EventLog
from zinfer.model.parameters import Parameter, decoder_layers
from zinfer.model.quantisable import inputs_of, stored_bits
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.pretrained import Opened
from zinfer.paths import PACKAGE
from zinfer.worker.quantised.one_layer import PartReader
from zinfer.worker.quantised.search import (
    Inputs,
    Scheme,
    packed,
    round_searched,
    unreachable,
    values_of,
)

TEXT_FILE = PACKAGE / "data" / "calibration_text.txt"
ROWS, TOKENS = 8, 512
"""Pieces of the text that are read side by side, and the tokens of each.

More tokens than inputs of a layer would be better still; a few thousand are where it stops to pay.
"""

Take = Callable[[str, torch.Tensor], None]
"""Receives a parameter's name and its packed bytes, uint8 of one dimension."""


class _Done(Exception):
    """The text has passed the last decoder layer: norms and the output head are not needed."""


def calibration_ids(tokenizer: Any, most: int | None) -> torch.Tensor:
    """Cut the text into pieces of equal length [ROWS, tokens].

    Args:
        most: positions that the model has; None: no end.
    """
    ids: list[int] = tokenizer(TEXT_FILE.read_text(encoding="utf-8"), add_special_tokens=False)[
        "input_ids"
    ]
    length = min(TOKENS, len(ids) // ROWS, most or TOKENS)
    return torch.tensor(ids[: ROWS * length]).view(ROWS, length)


def pack_model(
    opened: Opened,
    dtype: DtypeConfig,
    parameters: Iterable[Parameter],
    ids: torch.Tensor,
    take: Take,
    events: EventLog,
) -> None:
    """Round and pack every weight that is stored in few bits, and hand each over.

    Args:
        parameters: those of the model, tied ones once.
        ids: the text [rows, tokens].

    Raises:
        ConfigError: the model has no list of decoder layers.
        WrongWeights: a tensor of the checkpoint cannot be read.
    """
    with torch.no_grad():
        reader = PartReader(opened)
        model = reader.model
        text_config = opened.hf_config.get_text_config(decoder=True)
        layers = decoder_layers(model, text_config.num_hidden_layers)
        if not layers:
            raise ConfigError(
                [
                    f"dtype.rounding=searched: {type(model).__name__} has no list of decoder "
                    "layers. Set dtype.rounding=nearest"
                ]
            )
        weights = [each for each in parameters if stored_bits(each, dtype) is not None]
        walk = _Walk(reader, dtype, weights, take, events, len(layers))
        names = {id(module): name for name, module in model.named_modules()}
        for number, layer in enumerate(layers):
            layer.forward = partial(
                walk.visit, number, names[id(layer)], layer, type(layer).forward
            )
        inside = tuple(f"{names[id(layer)]}." for layer in layers)
        head = _head_names(model)
        outside = reader.filled(lambda name: not name.startswith(inside) and name not in head)
        with outside, suppress(_Done):
            model.base_model(input_ids=ids, use_cache=False)
        for parameter in weights:
            if parameter.layer is None:
                with reader.filled(partial(_is, parameter.name)):
                    walk.round_outside(parameter)


def _is(wanted: str, name: str) -> bool:
    return name == wanted


def _head_names(model: Any) -> set[str]:
    """Return the names of an output head of its own; one that is tied to the embedding is not."""
    inputs = model.get_input_embeddings()
    head = model.get_output_embeddings()
    if head is None or head is inputs:
        return set()
    path = next(name for name, module in model.named_modules() if module is head)
    return {f"{path}.{name}" for name, _ in head.named_parameters(recurse=False)}


class _Walk:
    """The way of the text through the layers."""

    def __init__(
        self,
        reader: PartReader,
        dtype: DtypeConfig,
        weights: list[Parameter],
        take: Take,
        events: EventLog,
        layers: int,
    ) -> None:
        self._reader = reader
        self._dtype = dtype
        self._weights = weights
        self._take = take
        self._events = events
        self._layers = layers

    def visit(
        self, number: int, path: str, layer: Any, forward: Any, *args: Any, **kwargs: Any
    ) -> Any:
        """Stand in for one layer's forward: read it, round it, run it, and let it go."""
        mine = [each for each in self._weights if each.name.startswith(f"{path}.")]
        with self._reader.filled(lambda name: name.startswith(f"{path}.")):
            for parameter in mine:
                self._require_reachable(parameter)
            with _seen_inputs(layer, path, mine) as seen:
                forward(layer, *args, **kwargs)
            for parameter in mine:
                self.round(parameter, seen.get(parameter.module))
            output = forward(layer, *args, **kwargs)
        self._events.progress(number + 1, self._layers, "layers rounded")
        if number + 1 == self._layers:
            raise _Done
        return output

    def round_outside(self, parameter: Parameter) -> None:
        """Round one weight outside the layers: nothing is known of what it reads."""
        self._require_reachable(parameter)
        self.round(parameter, None)

    def round(self, parameter: Parameter, inputs: Inputs | None) -> None:
        """Round one weight that is in memory, hand its bytes over, and leave the rounded values."""
        scheme = self._scheme(parameter)
        held = self._reader.model.get_parameter(parameter.name).data
        rows = _as_rows(held, parameter)
        fits = inputs is not None and len(inputs.squares) == inputs_of(parameter)
        try:
            codes, scales = round_searched(rows, scheme, inputs if fits else None)
        except ValueError as error:
            raise WrongWeights(
                f"tensor {parameter.name} cannot be fitted to what it multiplies: {error}. "
                "Set dtype.rounding=nearest"
            ) from error
        self._take(parameter.name, packed(codes, scales, scheme))
        values = values_of(codes, scales, scheme)[:, : rows.shape[1]]
        if parameter.is_transposed:
            values = values.view(*held.shape[:-2], held.shape[-1], held.shape[-2])
            values = values.transpose(-1, -2)
        held.copy_(values.reshape(held.shape))

    def _scheme(self, parameter: Parameter) -> Scheme:
        bits = stored_bits(parameter, self._dtype)
        assert bits is not None
        return Scheme(bits=bits, group_size=self._dtype.group_size, symmetric=self._dtype.symmetric)

    def _require_reachable(self, parameter: Parameter) -> None:
        """Raise WrongWeights where a value is too large for any scale in float16."""
        scheme = self._scheme(parameter)
        rows = _as_rows(self._reader.model.get_parameter(parameter.name).data, parameter)
        if (place := unreachable(rows, scheme)) is not None:
            row, column = place
            raise WrongWeights(
                f"tensor {parameter.name} cannot be held in {scheme.bits} bits: row {row}, column "
                f"{column} holds {rows[row, column]:g}, which scales in float16 do not reach. "
                f"Set dtype.keep=[{parameter.name}]"
            )


def _as_rows(held: torch.Tensor, parameter: Parameter) -> torch.Tensor:
    """Return a weight, or those of all experts, as rows along the input dimension [rows, in]."""
    turned = held.transpose(-1, -2) if parameter.is_transposed else held
    return turned.reshape(-1, turned.shape[-1])


@contextmanager
def _seen_inputs(layer: Any, path: str, wanted: list[Parameter]) -> Iterator[dict[str, Inputs]]:
    """Note what the modules of these weights are given in this block: module name -> inputs."""
    seen: dict[str, Inputs] = {}
    modules = {parameter.module for parameter in wanted}
    shared: dict[int, tuple[torch.Tensor, Inputs]] = {}

    def note(name: str, module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        given = next(
            each
            for each in (*args, *kwargs.values())
            if isinstance(each, torch.Tensor) and each.is_floating_point()
        )
        known = shared.get(id(given))
        if known is None:  # query, key and value read the same
            rows = given.reshape(-1, given.shape[-1]).float()
            known = given, Inputs(squares=rows.T @ rows / max(1, len(rows)))
            shared[id(given)] = known
        seen[name] = known[1]

    hooks = [
        module.register_forward_pre_hook(
            partial(note, f"{path}.{name}" if name else path), with_kwargs=True
        )
        for name, module in layer.named_modules()
        if (f"{path}.{name}" if name else path) in modules
    ]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()
