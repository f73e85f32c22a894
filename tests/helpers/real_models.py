"""Small real models of any family, generated with on the CPU, and what their cache holds then."""

from __future__ import annotations

from typing import Any

from zinfer.config import ModelConfig
from zinfer.model.hf import load_hf_config, model_class

ROWS, PROMPT_TOKENS, NEW_TOKENS = 2, 13, 6
"""The prompt is longer than the sliding windows of the small models, 8 tokens."""


def real_counts(model: ModelConfig) -> dict[str, Any]:
    """Make this model with random weights in float32, generate, and count what is there.

    Returns:
        parameters: elements of its weights, tied ones once.
        tokens: of each row in the cache, all but the last one.
        kv_cache_bytes: of all tensors that the model remembers, or None where none shows.
    """
    import torch

    from zinfer.worker.cache_bytes import remembered_bytes

    config = load_hf_config(model)
    torch.manual_seed(0)
    network = model_class(config)(config).to(torch.float32).eval()
    prompt = torch.randint(3, config.vocab_size, (ROWS, PROMPT_TOKENS))
    network.generation_config.eos_token_id = None
    network.generation_config.pad_token_id = 0
    output = network.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        return_dict_in_generate=True,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        use_cache=True,
    )
    assert output.sequences.shape == (ROWS, PROMPT_TOKENS + NEW_TOKENS)
    cache = output.get("past_key_values")
    if cache is None:
        cache = output.get("cache_params") or output.get("state") or output.get("mems")
    return {
        "parameters": sum(parameter.numel() for parameter in network.parameters()),
        "tokens": PROMPT_TOKENS + NEW_TOKENS - 1,
        "kv_cache_bytes": remembered_bytes(network, cache, ROWS),
    }
