"""Try a placement of the KV cache on a tiny model before the real one is loaded.

The families in TESTED are tested with zinfer. Any other architecture is tried at the start of a
run: a tiny model of its own code generates with transformers' cache and with ours. If the tokens
differ, or the code does not run this way, the run is refused with the reason.
"""

from __future__ import annotations

import copy
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import torch

from zinfer.config import ConfigError, RunConfig
from zinfer.model.hf import load_hf_config, model_class
from zinfer.worker.kv_cache import kernel, packer
from zinfer.worker.kv_cache.session import host_cache

if TYPE_CHECKING:
    from transformers import PretrainedConfig

TESTED = frozenset(
    {
        "bloom", "codegen", "deepseek_v3", "falcon", "gemma2", "gemma3_text", "gpt2", "gpt_neox",
        "gpt_oss", "gptj", "llama", "mistral", "mixtral", "mpt", "opt", "phi3", "qwen3",
        "qwen3_moe", "qwen3_next",
    }
)  # fmt: skip
"""Model types whose tokens are compared in tests/worker/kv_cache."""
TINY = {
    "vocab_size": 257,
    "hidden_size": 64,
    "n_embd": 64,
    "d_model": 64,
    "intermediate_size": 96,
    "ffn_dim": 96,
    "moe_intermediate_size": 48,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "head_dim": 16,
    "sliding_window": 8,
    "num_kv_shared_layers": 2,
    "attn_layer_period": 2,
    "attn_layer_offset": 1,
}
"""Sizes that a tiny model has where the real one has more."""
LATENT = "kv_lora_rank"
"""A configuration with it has head dimensions of its own (MLA), which are small already."""
HEADS = ("num_attention_heads", "n_head", "n_heads")
LAYERS = ("num_hidden_layers", "n_layer", "n_layers")
TINY_HEADS, TINY_LAYERS = 4, 4
PROMPT_TOKENS, NEW_TOKENS, ROWS = 13, 24, 3


def require_trial(config: RunConfig) -> str | None:
    """Refuse a placement under which this architecture generates other tokens.

    Refuse kv_cache.kernel=compiled too where no kernel can be compiled.

    Returns:
        A sentence about the trial; None where the family is one of those that are tested.

    Raises:
        ConfigError: the tokens differ, the architecture does not run this way, or there is no
            kernel.
    """
    if not config.kv_cache.is_offloaded:
        return None
    if config.kv_cache.kernel == "compiled":
        _require_kernel(config)
    real = load_hf_config(config.model).get_text_config(decoder=True)
    if real.model_type in TESTED:
        return None
    problem = trial(real, config)
    if problem is not None:
        raise ConfigError(
            [
                f"kv_cache={config.kv_cache.placement}: {real.model_type} is no family that zinfer "
                f"is tested with, and a tiny model of it failed a trial: {problem}. "
                "Set kv_cache=device"
            ]
        )
    return (
        f"kv_cache={config.kv_cache.placement} was tried on a tiny {real.model_type}: "
        "its tokens are those of transformers' own cache"
    )


def _require_kernel(config: RunConfig) -> None:
    """Load the compiled kernels of this placement, or refuse the run."""
    kv = config.kv_cache
    wanted = [kernel.library] if kv.placement == "host_attention" else []
    if min(kv.bits_of_keys, kv.bits_of_values) < 16:
        wanted.append(packer.library)
    for library in wanted:
        if isinstance(problem := library(), str):
            raise ConfigError([f"kv_cache.kernel=compiled: {problem}. Set kv_cache.kernel=auto"])


def trial(real: PretrainedConfig, config: RunConfig) -> str | None:
    """Generate with both caches; say what is wrong, or return None."""
    from zinfer.worker.kv_cache.routes import attached

    placement = replace(config.kv_cache, bits=16, key_bits=None, value_bits=None, device_layers=0)
    batch = replace(config.batch, prompt_tokens=PROMPT_TOKENS, new_tokens=NEW_TOKENS)
    plain = replace(config, kv_cache=placement, batch=batch)  # what bits cost is another question
    try:
        model = _tiny_model(real)
        ids, mask = _padded_prompts(model.config.vocab_size)
        expected = _generated(model, ids, mask)
        cache = host_cache(model, plain, on_gpu=False)
        if not cache.on_host:
            return "it has no layer of keys and values"
        with attached(model, cache):
            found = _generated(model, ids, mask, past_key_values=cache)
    except Exception as error:  # any architecture may do anything here; the reason is the result
        said = (str(error).strip() or "no message").splitlines()[0]
        return f"{type(error).__name__}: {said[:200]}"
    if not torch.equal(found.sequences, expected.sequences):
        return "it generates other tokens than with its own cache"
    difference = (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max().item()
    spread = torch.stack(expected.logits).std().item()
    return f"its logits differ by {difference:.2g}" if difference > 1e-3 * spread else None


def _tiny_model(real: PretrainedConfig) -> Any:
    """Build a small model of the same architecture, layer types and ratio of heads."""
    small = copy.deepcopy(real)
    groups = 1
    for name in HEADS:
        heads = getattr(small, name, None)
        if isinstance(heads, int):
            kv_heads = getattr(small, "num_key_value_heads", None) or heads
            groups = max(1, min(TINY_HEADS, heads // kv_heads))
            setattr(small, name, TINY_HEADS)
    if isinstance(getattr(small, "num_key_value_heads", None), int):
        small.num_key_value_heads = TINY_HEADS // groups
    kinds = _lists_of_layers(small)
    for name in LAYERS:
        if isinstance(getattr(small, name, None), int):
            setattr(small, name, TINY_LAYERS)
    if getattr(small, "attn_layer_indices", None):
        small.attn_layer_indices = [1]
    else:
        for name, chosen in _few_of_each(kinds).items():
            setattr(small, name, chosen)
    for name, size in TINY.items():
        value = getattr(small, name, None)
        if name == "head_dim" and hasattr(small, LATENT):
            continue
        if isinstance(value, int) and not isinstance(value, bool) and value > size:
            setattr(small, name, size)
    small.pad_token_id, small.eos_token_id, small.bos_token_id = 0, None, 1
    torch.manual_seed(0)
    model = model_class(small)(small).to(torch.float32).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.06)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def _is_derived(config: PretrainedConfig, name: str) -> bool:
    """Tell whether a field follows from others, so that it cannot be set."""
    name = config.attribute_map.get(name, name)
    return isinstance(getattr(type(config), name, None), property)


def _lists_of_layers(config: PretrainedConfig) -> dict[str, list[str]]:
    """Return the fields that have a word for each layer: `layer_types`, `mlp_layer_types`."""
    counts = {getattr(config, name, None) for name in LAYERS}
    return {
        name: list(value)
        for name, value in vars(config).items()
        if isinstance(value, list | tuple)
        and len(value) in counts
        and all(isinstance(word, str) for word in value)
        and not _is_derived(config, name)
    }


def _few_of_each(kinds: dict[str, list[str]]) -> dict[str, list[str]]:
    """Choose TINY_LAYERS layers: each kind that there is, in the order in which they first come.

    Where several fields describe a layer, those of one layer stay together.
    """
    if not kinds:
        return {}
    different = list(dict.fromkeys(zip(*kinds.values(), strict=True)))
    chosen = (different * TINY_LAYERS)[:TINY_LAYERS]
    return {name: list(words) for name, words in zip(kinds, zip(*chosen, strict=True), strict=True)}


def _padded_prompts(vocab_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(2, vocab_size, (ROWS, PROMPT_TOKENS), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(ROWS):
        ids[row, : 3 * row], mask[row, : 3 * row] = 0, 0
    return ids, mask


def _generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, **more: Any) -> Any:
    with torch.no_grad():
        return model.generate(
            input_ids=ids,
            attention_mask=mask,
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            use_cache=True,
            output_logits=True,
            return_dict_in_generate=True,
            **more,
        )
