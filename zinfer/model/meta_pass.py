"""Run a few tokens through a model without storage, to see its cache and count its operations."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from transformers import PreTrainedModel

PROBE_TOKENS = 8
"""More than the usual width of a convolution (4), so that its state has its full size."""
FIRST, LAST = 8, 4
"""In a long stack operations are counted in these layers only: counting is ten times as slow."""
NOT_ELEMENTWISE = frozenset({
    "mm", "addmm", "bmm", "baddbmm", "index", "_softmax", "_safe_softmax",
    "_scaled_dot_product_attention_math", "_unsafe_view",
})  # fmt: skip
"""Products and attention, which are counted from the model's sizes.

`index` gathers whole experts here, which no real run does.
"""


@dataclass(frozen=True)
class HiddenStates:
    """Inputs of each layer that XLNet keeps (its `mems`), [tokens, rows, hidden] each."""

    layers: tuple[Any, ...]


@dataclass(frozen=True, kw_only=True)
class MetaPass:
    """Result of the pass; where the model cannot run without storage, only the reason why."""

    cache: Any = None
    layer_ops: float | None = None
    """Operations of PyTorch's dispatcher (views too) that a decoder layer starts, the mean.

    None: not known.
    """
    layer_values: float | None = None
    """Elements that a decoder layer's elementwise operations write for each token, the mean.

    Elementwise are norms, activations, residuals and copies.
    """
    failed: str | None = None


def meta_pass(model: PreTrainedModel, layers: tuple[Any, ...]) -> MetaPass:
    """Run PROBE_TOKENS tokens of one sequence; `model`, on the meta device, becomes bfloat16.

    Args:
        layers: the decoder layers, in which operations are counted.
    """
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode

    class Counter(TorchDispatchMode):
        is_on, operations, values = False, 0, 0

        def turn(self, on: bool) -> None:
            if on != self.is_on:
                self.is_on = on
                self.__enter__() if on else self.__exit__(None, None, None)

        def __torch_dispatch__(
            self, func: Any, types: Any, args: Any = (), kwargs: Any = None
        ) -> Any:
            result = func(*args, **(kwargs or {}))
            self.operations += 1
            if func.overloadpacket.__name__ not in NOT_ELEMENTWISE and not _is_view(func):
                written = result if isinstance(result, tuple | list) else (result,)
                self.values += sum(
                    tensor.numel() for tensor in written[:1] if isinstance(tensor, torch.Tensor)
                )
            return result

    counter = Counter()
    counted = layers if len(layers) <= FIRST + LAST else layers[:FIRST] + layers[-LAST:]
    hooks = [layer.register_forward_pre_hook(lambda *_: counter.turn(True)) for layer in counted]
    hooks += [layer.register_forward_hook(lambda *_: counter.turn(False)) for layer in counted]
    model.to(torch.bfloat16).eval()
    model.config._experts_implementation = (
        "batched_mm"  # the only one whose shapes do not depend on which experts are chosen
    )
    try:
        filled = run_probe(model, "meta")
    except Exception as error:  # any family may do anything here; the reason is the result
        first_line = (str(error).strip() or type(error).__name__).splitlines()[0]
        return MetaPass(
            failed=f"{type(model).__name__} does not run on the meta device: "
            f"{type(error).__name__}: {first_line[:200]}"
        )
    finally:
        counter.turn(False)
        for hook in hooks:
            hook.remove()
    return MetaPass(
        cache=filled,
        layer_ops=counter.operations / len(counted) if counter.operations else None,
        layer_values=counter.values / PROBE_TOKENS / len(counted) if counter.operations else None,
    )


def run_probe(model: PreTrainedModel, device: str) -> Any:
    """Run PROBE_TOKENS tokens of one sequence and return what they fill: a cache or states."""
    import torch
    from transformers import DynamicCache

    def filled_by(**cache: Any) -> Any:
        with torch.no_grad():
            output = model(
                input_ids=torch.zeros(1, PROBE_TOKENS, dtype=torch.long, device=device),
                **cache,
                **{"use_mems" if keeps_inputs else "use_cache": True},
            )
        found = (output.get(name) for name in ("past_key_values", "cache_params", "state"))
        if (kept := output.get("mems")) is not None:
            return HiddenStates(tuple(kept))
        return next((each for each in found if each is not None), None)

    keeps_inputs = "use_mems" in inspect.signature(model.forward).parameters
    takes_cache = "past_key_values" in inspect.signature(model.forward).parameters
    has_default = model._supports_default_dynamic_cache()
    filled = None if has_default else filled_by()
    if filled is None and (has_default or takes_cache):
        given = DynamicCache(config=model.config)
        filled = filled_by(past_key_values=given)
        if filled is None and any(
            getattr(layer, "keys", None) is not None for layer in given.layers
        ):
            return given  # RecurrentGemma fills the cache that it is given, and returns none
    return filled


def _is_view(func: Any) -> bool:
    """Tell if an operation writes nothing and only looks at memory in another shape."""
    return any(
        found.alias_info is not None and not found.alias_info.is_write
        for found in func._schema.returns
    )
