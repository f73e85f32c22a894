"""The measured cache is all that a real model holds, whatever its family keeps it in."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from zinfer.worker.cache_bytes import remembered_bytes

ROWS, PROMPT, NEW, FLOAT = 2, 5, 4, 4
HELD = PROMPT + NEW - 1
"""Tokens in the cache at the end: those of the last token are never computed."""
SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64}
HEADS = {"intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
MAMBA = {**SMALL, "state_size": 8, "conv_kernel": 4, "expand": 2}
KEYS_AND_VALUES = 2 * ROWS * 2 * 8 * HELD * FLOAT
"""One attention layer with two key-value heads of 8."""
MAMBA_LAYER = ROWS * 64 * (4 + 8) * FLOAT
"""Inner size 64: 4 inputs of the convolution and a state of 8 for each."""

FAMILIES: dict[str, tuple[dict[str, Any], int]] = {
    "llama": ({**SMALL, **HEADS}, 2 * KEYS_AND_VALUES),
    "mamba": (MAMBA, 2 * MAMBA_LAYER),
    "falcon_mamba": (MAMBA, 2 * MAMBA_LAYER),
    "mamba2": (
        {**MAMBA, "num_heads": 8, "head_dim": 8, "n_groups": 1},
        2 * ROWS * ((64 + 2 * 8) * 4 + 8 * 8 * 8) * FLOAT,
    ),
    "rwkv": (
        {**SMALL, "attention_hidden_size": 32, "intermediate_size": 64, "context_length": 64},
        5 * ROWS * 32 * 2 * FLOAT,
    ),
    "jamba": (
        {
            **SMALL,
            **HEADS,
            "num_hidden_layers": 4,
            "num_experts": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_d_state": 8,
            "mamba_d_conv": 4,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
        2 * KEYS_AND_VALUES + 2 * MAMBA_LAYER,
    ),
    "minimax": (
        {
            **SMALL,
            **HEADS,
            "head_dim": 8,
            "num_local_experts": 2,
            "num_experts_per_tok": 1,
            "layer_types": ["linear_attention", "full_attention"],
            "block_size": 4,
        },
        KEYS_AND_VALUES + ROWS * 4 * 8 * 8 * FLOAT,
    ),
    "recurrent_gemma": (
        {
            **SMALL,
            **HEADS,
            "num_hidden_layers": 3,
            "num_key_value_heads": 1,
            "head_dim": 8,
            "lru_width": 32,
            "attention_window_size": 16,
            "conv1d_width": 4,
        },
        2 * ROWS * 8 * HELD * FLOAT + 2 * ROWS * 32 * (3 + 1) * FLOAT,
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_everything_that_is_remembered_is_counted(family: str) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig

    settings, expected = FAMILIES[family]
    config = AutoConfig.for_model(family, **settings)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    ids = torch.randint(4, 64, (ROWS, PROMPT))
    with torch.no_grad():
        result = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            generation_config=GenerationConfig(
                do_sample=False, max_new_tokens=NEW, eos_token_id=None, pad_token_id=0
            ),
            return_dict_in_generate=True,
        )
    assert remembered_bytes(model, result.past_key_values, ROWS) == expected


def test_each_tensor_counts_once_however_deep_it_lies() -> None:
    class Layer:
        def __init__(self, states: dict[int, torch.Tensor]) -> None:
            self.states, self.length = states, torch.zeros(1)

    shared = torch.zeros(2, 8)
    cache = {"layers": [Layer({0: shared, 1: torch.zeros(2, 3)}), (shared, None, "odd", 7)]}
    model = torch.nn.Linear(2, 2)
    assert remembered_bytes(model, cache, 2) == (16 + 6) * 4
    assert remembered_bytes(model, None, 2) is None
    assert remembered_bytes(model, object(), 2) is None
