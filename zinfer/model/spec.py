"""ModelSpec: parameters, their owners and KV-cache bytes of a model, before any weight exists.

Counted on the meta device from transformers' own classes, then kept (spec_cache). So the second
plan of a model, and the first of a catalogue model, imports neither torch nor transformers and
takes milliseconds.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zinfer.config import ITEMSIZE_BYTES
from zinfer.model.hf import DEFAULT_DTYPE, causal_config
from zinfer.model.kv_layout import KvLayer, kv_layout
from zinfer.model.limits import CountingTakesTooLong, counting_budget, refuse_uncountable
from zinfer.model.meta_pass import meta_pass
from zinfer.model.parameters import Parameter, decoder_layers, meta_model, weight_tensors
from zinfer.model.real_pass import real_kv_layout, without_rope_scaling
from zinfer.model.spec_cache import Fields, cache_key, is_kept, read_counted, write_counted

if TYPE_CHECKING:
    from transformers import PretrainedConfig

    from zinfer.config import ModelConfig

__all__ = [
    "KvLayer",
    "ModelSpec",
    "Parameter",
    "bytes_per_element",
    "hidden_bytes",
    "is_counted",
    "kv_bytes_per_token",
    "kv_cache_bytes",
    "kv_cache_bytes_paper",
    "model_spec",
]


@dataclass(frozen=True, kw_only=True)
class ModelSpec:
    """Architecture of one model; no weight has been read."""

    name: str
    model_type: str
    architecture: str
    """Class name in transformers."""
    dtype: str
    """Type of the computation: as asked for, else as the checkpoint's config says, else float16."""
    num_layers: int
    hidden_size: int
    num_attention_heads: int
    """Here and in the next two: the most of any layer, 0 in a model without attention."""
    num_kv_heads: int
    head_dim: int
    """Elements of one query or key head."""
    intermediate_size: int | None
    """Width of the dense feed-forward block. None: the config does not say."""
    vocab_size: int
    max_positions: int | None
    """None: no limit of its own (ALiBi)."""
    tied_embeddings: bool
    num_parameters: int
    """Tied weights once; buffers not."""
    num_active_parameters: int | None
    """Used for one token: all but the routed experts that are not chosen.

    None: the config does not say how many are chosen.
    """
    num_experts: int | None
    experts_per_token: int | None
    parameters: tuple[Parameter, ...]
    layer_classes: tuple[str, ...]
    """Class names of the decoder layers; empty where there is no list of them."""
    layer_modules: float | None
    """Modules of a decoder layer, itself included, the mean. None: there is no list of layers."""
    layer_ops: float | None
    """Operations that one decoder layer starts in a forward pass (see meta_pass.MetaPass).

    None: the layer was not seen running.
    """
    layer_values: float | None
    """Elements that they write for each token, products and attention apart."""
    kv_layers: tuple[KvLayer, ...] | None
    kv_unknown_reason: str | None
    text_part_of: str | None = None
    """The multimodal model_type whose text part this is. Nothing else of it is counted or run."""

    @property
    def bytes_per_element(self) -> int:
        """Bytes of one element of the compute dtype."""
        return bytes_per_element(self.dtype)

    @property
    def weight_bytes(self) -> int:
        """Bytes of all parameters in the compute dtype."""
        return self.num_parameters * self.bytes_per_element

    @property
    def largest_parameter(self) -> Parameter:
        """The weight tensor with the most elements."""
        return max(self.parameters, key=lambda parameter: parameter.numel)

    @property
    def largest_layer_numel(self) -> int:
        """Elements of the biggest decoder layer."""
        per_layer: dict[int, int] = {}
        for parameter in self.parameters:
            if parameter.layer is not None:
                per_layer[parameter.layer] = per_layer.get(parameter.layer, 0) + parameter.numel
        return max(per_layer.values(), default=self.num_parameters)


def bytes_per_element(dtype: str) -> int:
    """Return the bytes of one element of a compute dtype; ValueError for another dtype."""
    if dtype not in ITEMSIZE_BYTES:
        raise ValueError(
            f"compute dtype {dtype} is not one of {', '.join(ITEMSIZE_BYTES)}. Set dtype=bfloat16"
        )
    return ITEMSIZE_BYTES[dtype]


def kv_bytes_per_token(spec: ModelSpec) -> int | None:
    """Return the bytes that one more token of one sequence adds to the KV cache. None: not known.

    Keys and values of all layers count. Layers with a sliding window are left out: once their
    window is full, a token adds nothing to them. A compressed entry counts as its tokens' share,
    rounded down over all layers. For multi-head attention this is
    2 * num_layers * num_kv_heads * head_dim * bytes_per_element.
    Source: Kwon et al. 2023 (arXiv:2309.06180) section 3, generalised to grouped-query and latent
    attention.
    """
    if spec.kv_layers is None:
        return None
    whole = sum(layer.values_per_token for layer in spec.kv_layers if layer.window is None)
    shares = sum(
        layer.compressed_values / layer.compress_rate
        for layer in spec.kv_layers
        if layer.compress_rate
    )
    return int((whole + shares) * spec.bytes_per_element)


def kv_cache_bytes(spec: ModelSpec, batch_size: int, tokens: int) -> int | None:
    """Return the bytes of the KV cache, recurrent states included. None: not known.

    Counted are the tensors that transformers' DynamicCache hands on to the next step. A sliding
    layer is a view: the memory behind it also holds the token that just left the window, and right
    after the prefill the whole prompt.

    Args:
        batch_size: sequences.
        tokens: prompt and new tokens of each sequence.
    """
    if spec.kv_layers is None:
        return None
    return batch_size * sum(
        layer.cache_bytes(tokens, spec.bytes_per_element) for layer in spec.kv_layers
    )


def kv_cache_bytes_paper(spec: ModelSpec, batch_size: int, tokens: int) -> int:
    """Return the KV-cache bytes of the published formula.

    It is right for multi-head attention, and too much for grouped-query, latent and sliding ones.
    Source: cache_bytes in DeepSpeedExamples inference/huggingface/zero_inference/utils.py; the same
    in FlexGen's opt_config.py (there always 2 bytes per element).
    """
    return 2 * batch_size * tokens * spec.num_layers * spec.hidden_size * spec.bytes_per_element


def hidden_bytes(spec: ModelSpec, batch_size: int, tokens: int) -> int:
    """Return the bytes of one layer's hidden states of the whole batch.

    Source: hidden_bytes beside cache_bytes, as in kv_cache_bytes_paper.
    """
    return batch_size * tokens * spec.hidden_size * spec.bytes_per_element


def model_spec(model: ModelConfig, *, compute_dtype: str | None = None) -> ModelSpec:
    """Return the architecture of `model`, counted now or kept from before.

    Raises:
        ValueError: it cannot be read, or is no causal language model. Says what to set instead.
    """
    key, is_stored = cache_key(model)
    fields = _COUNTED.get(key) or (read_counted(key) if is_stored else None)
    if fields is None:
        fields = count(model)
        if is_stored:
            write_counted(key, fields)
    _COUNTED[key] = fields
    fields = dict(fields)
    config_dtype = fields.pop("config_dtype")
    dtype = compute_dtype or model.checkpoint_dtype or config_dtype or DEFAULT_DTYPE
    bytes_per_element(dtype)
    return ModelSpec(name=model.name, dtype=dtype, **fields)


def is_counted(model: ModelConfig) -> bool:
    """Tell if model_spec knows this architecture from before, so that it imports no torch."""
    key, is_stored = cache_key(model)
    return key in _COUNTED or (is_stored and is_kept(key))


_COUNTED: dict[str, Fields] = {}
"""Known in this process: cache key -> fields."""


# ---- counting ----


def count(model: ModelConfig) -> Fields:
    """Count this architecture now, even if it is kept. Imports torch and transformers.

    Raises:
        ValueError: as model_spec does.
    """
    with _no_garbage_collection():
        config, text_part_of = causal_config(model)
        try:
            with counting_budget():
                return _count(config, model) | {"text_part_of": text_part_of}
        except CountingTakesTooLong as error:
            raise ValueError(
                f"model={model.name}: {error}. It has {config.num_hidden_layers} layers; "
                "real models take seconds. Set a smaller model.overrides.num_hidden_layers"
            ) from error


@contextlib.contextmanager
def _no_garbage_collection() -> Iterator[None]:
    """Stop collecting garbage while transformers is imported.

    The import makes millions of objects that live on. Looking through them takes a fifth of the
    time.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def _count(config: PretrainedConfig, model: ModelConfig) -> Fields:
    if missing := [
        name
        for name in ("num_hidden_layers", "hidden_size", "vocab_size")
        if not isinstance(_first(config, name), int)
    ]:
        raise ValueError(
            f"model={model.name} ({config.model_type}) names no {', '.join(missing)}: "
            "it is not one stack of decoder layers"
        )
    empty = meta_model(config, model)
    parameters = weight_tensors(empty, config.num_hidden_layers)
    refuse_uncountable(
        {parameter.name: parameter.numel for parameter in parameters},
        f"model={model.name}",
        config.to_dict(),
    )
    num_parameters = sum(parameter.numel for parameter in parameters)
    num_experts, experts_per_token = _experts(config, parameters)
    expert_numel = sum(parameter.numel for parameter in parameters if parameter.is_expert)
    active = None
    if expert_numel == 0:
        active = num_parameters
    elif num_experts and experts_per_token:
        active = num_parameters - expert_numel + expert_numel * experts_per_token // num_experts
    head = empty.get_output_embeddings()
    tied = head is not None and head.weight is empty.get_input_embeddings().weight
    layers = decoder_layers(empty, config.num_hidden_layers)
    done = meta_pass(empty, layers)
    plain = without_rope_scaling(config) if done.failed else None
    if plain is not None:
        empty = meta_model(plain, model)
        done = meta_pass(empty, decoder_layers(empty, config.num_hidden_layers))
    kv_layers, reason = kv_layout(empty, config, done)
    if done.failed and (real := real_kv_layout(config)) is not None:
        kv_layers, reason = real, None
    num_heads = _first(config, "num_attention_heads", default=0)
    return {
        "model_type": config.model_type,
        "architecture": type(empty).__name__,
        "num_layers": config.num_hidden_layers,
        "hidden_size": config.hidden_size,
        "num_attention_heads": num_heads,
        "num_kv_heads": _num_kv_heads(config, num_heads),
        "head_dim": _first(
            config, "qk_head_dim", "head_dim", default=config.hidden_size // num_heads
        )
        if num_heads
        else 0,
        "intermediate_size": _intermediate_size(config),
        "vocab_size": config.vocab_size,
        "max_positions": _max_positions(config),
        "tied_embeddings": tied,
        "num_parameters": num_parameters,
        "num_active_parameters": active,
        "num_experts": num_experts,
        "experts_per_token": experts_per_token,
        "parameters": parameters,
        "layer_classes": tuple(dict.fromkeys(type(layer).__name__ for layer in layers)),
        "layer_modules": sum(1 for layer in layers for _ in layer.modules()) / len(layers)
        if layers
        else None,
        "layer_ops": done.layer_ops,
        "layer_values": done.layer_values,
        "kv_layers": kv_layers,
        "kv_unknown_reason": reason,
        "config_dtype": None if config.dtype is None else str(config.dtype).removeprefix("torch."),
    }


def _max_positions(config: PretrainedConfig) -> int | None:
    """Return the most positions of the model; None where it has no limit (XLNet says -1)."""
    found = _first(config, "max_position_embeddings", "n_positions", "max_seq_len")
    return found if found is None or found > 0 else None


def _experts(
    config: PretrainedConfig, parameters: tuple[Parameter, ...]
) -> tuple[int | None, int | None]:
    """Return the routed experts of a layer and how many a token uses; twice None if dense."""
    fused = [parameter for parameter in parameters if parameter.is_expert]
    if not fused:
        return None, None
    num_experts = _first(
        config, "num_local_experts", "num_experts", "n_routed_experts", "moe_num_experts"
    )
    if isinstance(num_experts, list) or num_experts is None:
        num_experts = fused[0].shape[0] if len(fused[0].shape) == 3 else None
    return num_experts, _first(
        config, "num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "top_k_experts"
    )


def _num_kv_heads(config: PretrainedConfig, num_heads: int) -> int:
    is_new_falcon = getattr(config, "new_decoder_architecture", False)
    if getattr(config, "multi_query", False) and not is_new_falcon:  # Falcon, GPT-BigCode
        return 1
    return _first(config, "num_key_value_heads", "num_kv_heads", default=num_heads)


def _intermediate_size(config: PretrainedConfig) -> int | None:
    if config.model_type == "bloom":
        return 4 * config.hidden_size  # BloomMLP; the config has no field for it
    size = _first(config, "intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size")
    return size if isinstance(size, int) else None


def _first(config: PretrainedConfig, *names: str, default: Any = None) -> Any:
    """Return the first of these attributes that the config has and that is not None.

    Where an attribute differs from layer to layer, its largest value counts.
    """
    for name in names:
        try:
            value = getattr(config, name, None)
        except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError
            value = max(getattr(layer, name) for layer in config.per_layer_config)
        if value is not None:
            return value
    return default
