"""Read from transformers' own KV cache how much each layer of a model keeps there.

One forward pass of a few tokens, over a model without storage, fills a real cache object. Its
layers say what they hold. So MHA, GQA, sliding windows, latent attention and recurrent states need
no formula of ours. A family that cannot be read is reported with the reason.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zinfer.model.meta_pass import PROBE_TOKENS, HiddenStates, MetaPass
from zinfer.model.parameters import decoder_layers

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedModel

GROWING_LAYERS = {"DynamicLayer", "DynamicIndexedLayer", "LinearAttentionAndFullAttentionLayer"}
WINDOWED_LAYERS = {"DynamicSlidingWindowLayer", "LinearAttentionAndSlidingWindowAttentionLayer"}
COMPRESSING_LAYERS = {"DeepseekV4HCACache", "DeepseekV4CSACache"}
CONSTANT_LAYERS = {"LinearAttentionLayer", "DummyLayer"}
"""Classes of transformers.cache_utils whose growth is known. Any other is refused, not guessed."""


@dataclass(frozen=True, kw_only=True)
class KvLayer:
    """Size of one layer's cache for one sequence, in elements."""

    kind: str
    """mha, gqa, mla, sliding, compressed, hidden, linear_state, hybrid or none.

    compressed: a window of keys, and one entry for so many tokens (DeepSeek-V4).
    hidden: the layer's inputs, from which it computes keys and values anew.
    hybrid: attention and a recurrent state. none: no attention, or it uses another layer's cache.
    """
    values_per_token: int
    """Keys, values and whatever else grows with the sequence."""
    key_dim: int | None = None
    """Elements of one head's key; None where no heads of keys and values are kept."""
    value_dim: int | None = None
    """Elements of one head's value: not always as many as of a key (MiMo-V2-Flash)."""
    window: int | None = None
    """The attention window in tokens, None when the layer sees everything."""
    const_values: int = 0
    """Convolution and recurrent state in the compute dtype. The length does not change its size."""
    const_float32_values: int = 0
    """Recurrent state that stays in float32 whatever the compute dtype is."""
    compress_rate: int | None = None
    """Tokens that become one compressed entry; None: the layer compresses nothing."""
    compressed_values: int = 0
    """Elements of one compressed entry."""
    waiting_values: int = 0
    """Elements of a token that waits until its entry is full."""
    overlap_values: int = 0
    """Elements kept of the last full entry's tokens, once there is one."""

    def cached_tokens(self, tokens: int) -> int:
        """Return how many tokens of a sequence of `tokens` this layer holds between two steps.

        A sliding layer holds window - 1: the next token makes the window full.
        Source: transformers' DynamicSlidingWindowLayer.
        """
        return tokens if self.window is None else min(tokens, self.window - 1)

    def cache_bytes(self, tokens: int, bytes_per_element: int) -> int:
        """Return the bytes of this layer's cache for one sequence of `tokens` tokens."""
        elements = self.grown_values(tokens) + self.const_values
        return elements * bytes_per_element + 4 * self.const_float32_values

    def grown_values(self, tokens: int) -> int:
        """Return the elements that a sequence of `tokens` tokens made: all but fixed states.

        Source of compression: transformers' DeepseekV4HCACache and DeepseekV4CSACache.
        """
        values = self.values_per_token * self.cached_tokens(tokens)
        if self.compress_rate is None:
            return values
        entries, waiting = divmod(tokens, self.compress_rate)
        values += entries * self.compressed_values + waiting * self.waiting_values
        return values + (self.overlap_values if entries else 0)


def kv_layout(
    model: PreTrainedModel, config: PretrainedConfig, done: MetaPass
) -> tuple[tuple[KvLayer, ...] | None, str | None]:
    """Return each layer's cache after that pass of `model`, or None and why it cannot be read."""
    if done.failed:
        return None, done.failed
    name = type(model).__name__
    if isinstance(done.cache, HiddenStates):
        return tuple(map(_hidden_layer, done.cache.layers)), None
    layers, states = _held(done.cache, config.num_hidden_layers)
    if layers is None and not any(states):
        return (
            None,
            f"{name} keeps no cache with one entry for each layer between steps "
            f"(but {type(done.cache).__name__})",
        )
    for index, held in enumerate(_module_states(model, config.num_hidden_layers)):
        states[index] += held
    layers = layers or [None] * config.num_hidden_layers
    try:
        return tuple(
            _kv_layer(layer, config, index, states[index]) for index, layer in enumerate(layers)
        ), None
    except ValueError as error:
        return None, f"{name}: {error}"


def _held(cache: Any, num_layers: int) -> tuple[list[Any] | None, list[list[Any]]]:
    """Return what each layer has in a cache, and which states each has beside it."""
    import torch

    states: list[list[Any]] = [[] for _ in range(num_layers)]
    if (
        isinstance(cache, list | tuple)
        and cache
        and all(
            isinstance(state, torch.Tensor) and state.shape[-1] == num_layers for state in cache
        )
    ):  # RWKV: the last dimension of each state is the layer
        for index in range(num_layers):
            states[index] = [state[..., index] for state in cache]
        return None, states
    if type(cache).__name__ == "xLSTMCache":
        for index, held in cache.rnn_state.items():
            states[index] = list(held)
        return None, states
    if type(cache).__name__ == "MiniMaxCache":
        for index, state in enumerate(cache.linear_cache):
            states[index] = [state] if isinstance(state, torch.Tensor) else []
        attention = [*cache.layers, *[None] * num_layers][:num_layers]
        return [None if states[i] else layer for i, layer in enumerate(attention)], states
    layers = getattr(cache, "layers", [])
    known = type(cache).__name__ == "DynamicCache" and len(layers) == num_layers
    return (layers if known else None), states


def _hidden_layer(kept: Any) -> KvLayer:
    """Describe a layer that keeps its input, [tokens, rows, hidden], in place of keys and values.

    While generating, XLNet puts the token that it predicts behind the others, and keeps it too.
    Source: XLNetLMHeadModel.prepare_inputs_for_generation.
    """
    tokens, _, hidden = kept.shape
    if tokens != PROBE_TOKENS:
        raise ValueError(f"it keeps {tokens} of {PROBE_TOKENS} tokens")
    return KvLayer(kind="hidden", values_per_token=hidden, const_values=hidden)


def _module_states(model: PreTrainedModel, num_layers: int) -> list[list[Any]]:
    """Return the states that modules of each decoder layer keep themselves (RecurrentGemma)."""
    import torch

    return [
        [
            value
            for module in layer.modules()
            for name, value in vars(module).items()
            if "state" in name and isinstance(value, torch.Tensor) and value.dim() > 1
        ]
        for layer in decoder_layers(model, num_layers)
    ]


def _kv_layer(layer: Any, config: PretrainedConfig, layer_index: int, beside: list[Any]) -> KvLayer:
    """Describe one layer: its entry in the filled cache, if any, and the states beside it."""
    class_name = type(layer).__name__
    if class_name in COMPRESSING_LAYERS:
        return _compressing_layer(layer)
    if layer is not None and class_name not in GROWING_LAYERS | WINDOWED_LAYERS | CONSTANT_LAYERS:
        raise ValueError(f"how {class_name} grows with the sequence is not known")
    inside = [
        *getattr(layer, "conv_states", {}).values(),
        *getattr(layer, "recurrent_states", {}).values(),
    ]
    states = [state for state in [*inside, *beside] if state is not None]
    const_float32_values = sum(state.numel() for state in states if state.element_size() == 4)
    const_values = sum(state.numel() for state in states) - const_float32_values
    has_state = bool(states)
    keys, values, indexer_keys = (
        getattr(layer, name, None) for name in ("keys", "values", "indexer_keys")
    )
    if layer is not None and (extra := _unexplained(layer, [*states, keys, values, indexer_keys])):
        raise ValueError(f"{class_name} also holds {', '.join(extra)}")
    if keys is None or keys.numel() == 0:
        kind = "linear_state" if has_state else "none"
        return KvLayer(
            kind=kind,
            values_per_token=0,
            const_values=const_values,
            const_float32_values=const_float32_values,
        )
    window = int(layer.sliding_window) if class_name in WINDOWED_LAYERS else None
    held_tokens = PROBE_TOKENS if window is None else min(PROBE_TOKENS, window - 1)
    if window is None and keys.shape[-2] == held_tokens + getattr(config, "prompt_length", 0):
        held_tokens = keys.shape[-2]  # CPM-Ant puts a learned prompt before every sequence
    if keys.shape[-2] != held_tokens:
        raise ValueError(
            f"{class_name} stores keys as {tuple(keys.shape)}, "
            "not [batch, heads, tokens, dimension]"
        )
    grown = [tensor for tensor in (keys, values, indexer_keys) if tensor is not None]
    if any(tensor.element_size() != 2 for tensor in grown):
        raise ValueError(f"{class_name} does not store keys and values in the compute dtype")
    values_per_token = sum(tensor.numel() for tensor in grown) // held_tokens
    prompt_tokens = max(0, held_tokens - PROBE_TOKENS)
    return KvLayer(
        kind="hybrid" if has_state else _attention_kind(config, layer_index, keys.shape[1], window),
        values_per_token=values_per_token,
        key_dim=int(keys.shape[-1]),
        value_dim=None if values is None else int(values.shape[-1]),
        window=window,
        const_values=const_values + values_per_token * prompt_tokens,
        const_float32_values=const_float32_values,
    )


def _compressing_layer(layer: Any) -> KvLayer:
    """Describe a layer that compresses tokens beyond its window; keys serve as values too.

    Raises:
        ValueError: it holds something else than these rules say.
    """
    rate = int(layer.compress_rate)
    overlap = getattr(layer, "overlap_kv", {})
    compressed = waiting = overlapping = 0
    for name, buffer in layer.buffer_kv.items():
        width = int(buffer.shape[-1])  # two series of entries where windows overlap
        entry = width // 2 if name in overlap else width
        compressed, waiting = compressed + entry, waiting + 2 * width
        overlapping += 2 * rate * entry if name in overlap else 0
    found = KvLayer(
        kind="compressed",
        values_per_token=int(layer.keys.shape[1] * layer.keys.shape[-1]),
        window=int(layer.sliding_window),
        compress_rate=rate,
        compressed_values=compressed,
        waiting_values=waiting,
        overlap_values=overlapping,
    )
    parts = ("buffer_kv", "buffer_gate", "compressed_kv", "overlap_kv", "overlap_gate")
    held = [layer.keys]
    held += [value for part in parts for value in getattr(layer, part, {}).values()]
    held = [value for value in held if value is not None]
    numel = sum(value.numel() for value in held)
    if numel != found.grown_values(PROBE_TOKENS):
        raise ValueError(f"{type(layer).__name__} holds {numel} values of {PROBE_TOKENS} tokens")
    if any(value.element_size() != 2 for value in held):
        raise ValueError(f"{type(layer).__name__} does not store all in the compute dtype")
    return found


def _attention_kind(
    config: PretrainedConfig, layer_index: int, cached_heads: int, window: int | None
) -> str:
    if window is not None:
        return "sliding"
    if getattr(config, "kv_lora_rank", None) and cached_heads == 1:
        return "mla"
    per_layer = getattr(
        config, "per_layer_config", None
    )  # a configuration may differ from layer to layer
    query_heads = getattr(
        per_layer[layer_index] if per_layer else config, "num_attention_heads", None
    )
    return "mha" if cached_heads == query_heads else "gqa"


def _unexplained(layer: Any, explained: list[Any]) -> list[str]:
    """Return names of the layer's tensors, counters apart, that the size leaves out."""
    import torch

    known = {id(tensor) for tensor in explained}
    return [
        name
        for name, held in vars(layer).items()
        if isinstance(held, torch.Tensor) and held.numel() > 1 and id(held) not in known
    ]
