"""Read the KV cache of families that cannot run without storage, from a small real instance.

Some families look at values: BioGPT counts the tokens of its mask, JetMoE sends tokens to experts.
There are no values on the meta device. But the vocabulary, the feed-forward width and the number of
experts do not change the cache, and each layer of such a stack holds the same. So a real instance
of two layers, shrunk in those sizes, runs on the CPU, and its layer is repeated.
"""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING, Any

from zinfer.model.hf import model_class
from zinfer.model.kv_layout import KvLayer, kv_layout
from zinfer.model.meta_pass import MetaPass, run_probe

if TYPE_CHECKING:
    from transformers import PretrainedConfig

PROBE_LAYERS = 2
SHRUNK = {
    "vocab_size": 128,
    "intermediate_size": 64,
    "ffn_dim": 64,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_intermediate_size": 32,
}
"""Sizes that do not change the cache, and what they are cut to."""
MOST_NUMEL = 500_000_000
"""Parameters of the small instance: at most 2 GB while it is built in float32."""


def without_rope_scaling(config: PretrainedConfig) -> PretrainedConfig | None:
    """Return a copy with plain rotary positions, or None where they are plain already.

    Scaled positions change the values of keys and not their number. Some (dynamic NTK) look at the
    longest position, which the meta device does not have.
    """
    rope = getattr(config, "rope_parameters", None)
    if not isinstance(rope, dict) or rope.get("rope_type", "default") == "default":
        return None
    plain = copy.deepcopy(config)
    plain.rope_parameters = {"rope_type": "default", "rope_theta": rope.get("rope_theta", 10000.0)}
    return plain


def real_kv_layout(config: PretrainedConfig) -> tuple[KvLayer, ...] | None:
    """Return each layer's cache as a small real instance fills it; None where it cannot tell.

    Layers of different types cannot be told from two, so such a stack is left out.
    """
    import torch

    try:
        small = _shrunk(config)
        if small is None:
            return None
        cls = model_class(small)
        with torch.device("meta"):
            numel = sum(parameter.numel() for parameter in cls(small).parameters())
        if numel > MOST_NUMEL:
            return None
        model = cls(small)
        done = run_probe(model.to(torch.bfloat16).eval(), "cpu")
    except Exception:  # the reason that the meta pass gave stays the reason
        return None
    found, _ = kv_layout(model, small, MetaPass(cache=done))
    if found is None or len(set(found)) != 1:
        return None
    return found[:1] * config.num_hidden_layers


def _shrunk(config: PretrainedConfig) -> PretrainedConfig | None:
    layer_types = getattr(config, "layer_types", None)
    if config.num_hidden_layers < PROBE_LAYERS or (layer_types and len(set(layer_types)) > 1):
        return None
    small = copy.deepcopy(config)
    small.num_hidden_layers = PROBE_LAYERS
    if layer_types:
        small.layer_types = layer_types[:PROBE_LAYERS]
    for name, size in SHRUNK.items():
        value: Any = getattr(small, name, None)
        if isinstance(value, int) and value > size:
            setattr(small, name, size)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        value = getattr(small, name, None)
        if isinstance(value, int) and value >= small.vocab_size:
            setattr(small, name, 1)
    return small
