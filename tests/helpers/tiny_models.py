"""Small random models of many families, in float32, whose greedy rows vary."""

from __future__ import annotations

from typing import Any

import torch
import transformers

VOCAB = 257
COMMON = {"hidden_size": 64, "num_hidden_layers": 3, "vocab_size": VOCAB}
HEADS = {**COMMON, "intermediate_size": 96, "num_attention_heads": 4}
GROUPED = {**HEADS, "num_key_value_heads": 2}
EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}
NARROW = {**GROUPED, "head_dim": 16}
N_STYLE = {"n_embd": 64, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB}

FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "opt": (
        "OPTConfig",
        {
            **COMMON,
            "word_embed_proj_dim": 64,
            "ffn_dim": 128,
            "num_attention_heads": 4,
            "max_position_embeddings": 512,
        },
    ),
    "llama": ("LlamaConfig", GROUPED),
    "llama_mha": ("LlamaConfig", {**HEADS, "num_key_value_heads": 4}),
    "mixtral": ("MixtralConfig", {**GROUPED, **EXPERTS, "sliding_window": None}),
    "mixtral_window": ("MixtralConfig", {**GROUPED, **EXPERTS, "sliding_window": 8}),
    "qwen3": ("Qwen3Config", NARROW),
    "qwen3_moe": (
        "Qwen3MoeConfig",
        {**NARROW, "moe_intermediate_size": 48, "num_experts": 4, "num_experts_per_tok": 2},
    ),
    "gpt_oss": (
        "GptOssConfig",
        {**NARROW, **EXPERTS, "num_hidden_layers": 4, "sliding_window": 8},
    ),
    "gemma2": ("Gemma2Config", {**NARROW, "num_hidden_layers": 4, "sliding_window": 8}),
    "gemma3": ("Gemma3TextConfig", {**NARROW, "num_hidden_layers": 7, "sliding_window": 8}),
    "mistral_window": ("MistralConfig", {**GROUPED, "sliding_window": 8}),
    "phi3": ("Phi3Config", {**GROUPED, "pad_token_id": 0}),
    "gpt_neox": ("GPTNeoXConfig", HEADS),
    "gpt2": ("GPT2Config", N_STYLE),
    "gptj": ("GPTJConfig", {**N_STYLE, "rotary_dim": 8}),
    "codegen": ("CodeGenConfig", {**N_STYLE, "rotary_dim": 8}),
    "bloom": ("BloomConfig", {"hidden_size": 64, "n_head": 4, "n_layer": 3, "vocab_size": VOCAB}),
    "mpt": (
        "MptConfig",
        {"d_model": 64, "n_heads": 4, "n_layers": 3, "vocab_size": VOCAB, "max_seq_len": 512},
    ),
    "falcon": (
        "FalconConfig",
        {
            **COMMON,
            "num_attention_heads": 4,
            "num_kv_heads": 2,
            "new_decoder_architecture": True,
            "alibi": False,
        },
    ),
    "falcon_alibi": (
        "FalconConfig",
        {
            **COMMON,
            "num_attention_heads": 4,
            "multi_query": False,
            "new_decoder_architecture": False,
            "alibi": True,
        },
    ),
    "deepseek_v3": (
        "DeepseekV3Config",
        {
            **HEADS,
            "num_key_value_heads": 4,
            "moe_intermediate_size": 48,
            "n_routed_experts": 4,
            "num_experts_per_tok": 2,
            "n_group": 1,
            "topk_group": 1,
            "q_lora_rank": 32,
            "kv_lora_rank": 16,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 16,
            "v_head_dim": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "qwen3_next": (
        "Qwen3NextConfig",
        {
            **NARROW,
            "num_hidden_layers": 4,
            "moe_intermediate_size": 48,
            "shared_expert_intermediate_size": 48,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 16,
            "linear_value_head_dim": 16,
        },
    ),
}


def tiny_model(family: str, **changes: Any) -> Any:
    """Build a model of a family with random weights, always the same.

    Weights are three times their usual size: logits then differ enough for rows to vary.
    """
    name, settings = FAMILIES[family]
    config = getattr(transformers, name)(**{**settings, **changes})
    config.pad_token_id, config.eos_token_id, config.bos_token_id = 0, None, 1
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "sinks" in name:
                parameter.normal_(0, 1)
            elif not torch.isfinite(parameter).all():
                parameter.normal_(0, 0.05)
            elif parameter.dim() > 1:
                parameter.mul_(3)
    model.generation_config.pad_token_id, model.generation_config.eos_token_id = 0, None
    return model


def padded_prompts(
    rows: int = 3, tokens: int = 13, *, padded: bool = True, seed: int = 1
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return token ids and attention mask [rows, tokens]; later rows begin with more padding."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, VOCAB, (rows, tokens), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(rows if padded else 0):
        pads = (row * 3) % (tokens - 2)
        ids[row, :pads], mask[row, :pads] = 0, 0
    return ids, mask
