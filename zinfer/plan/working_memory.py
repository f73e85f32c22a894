"""Count the states of one forward pass: hidden, feed-forward, attention scores, logits.

The prefill is counted, which is never smaller than a decode step. The lists of live tensors were
read in transformers 5.23 and agree within a tenth with the peak of runs whose freed memory goes
back to the system at once (LLaMA, OPT; 2,048 tokens, hidden size 512).
"""

from __future__ import annotations

from zinfer.config import ITEMSIZE_BYTES
from zinfer.model.spec import ModelSpec
from zinfer.units import MIB

EAGER_ATTENTION = frozenset({
    "bloom", "codegen", "deepseek_v4", "gemma2", "gpt_neo", "gpt_neox_japanese", "gpt_oss",
    "gptj", "granite_swa", "granitemoe_swa", "mimo_v2_flash", "mpt", "vaultgemma", "xglm",
})  # fmt: skip
"""Families without `_supports_sdpa` in transformers 5.23.

Their attention materialises the scores of all pairs of tokens.
"""
EAGER_SCORE_COPIES = 3
"""Copies of the scores in eager attention: product, masked, softmax (in float32)."""
PLAIN_FEED_FORWARD = frozenset({"opt", "gptj", "gpt_neox", "codegen", "gpt2"})
"""Families with one matrix up and one down.

The states before and after the activation function are alive at once.
"""
GATED_COPIES = 3
"""Feed-forward-wide tensors alive at once in a gated block: activated gate, up, product."""
PLAIN_COPIES = 2
BLOOM_COPIES = 4
"""BLOOM writes its GELU out in elementwise operations."""
HIDDEN_COPIES = 2
"""Residual and normed input, alive during the feed-forward block."""
ATTENTION_HIDDEN_COPIES = 6
"""Residual, normed input, Q, K, V, output, alive during attention."""
CUDA_CONTEXT_BYTES = 512 * MIB
"""Driver context, loaded kernels and cuBLAS: outside torch's allocator.

Between 300 and 600 MiB, depending on the GPU.
"""


def prefill_bytes(spec: ModelSpec, rows: int, prompt_tokens: int) -> dict[str, int]:
    """Return bytes by name that are alive at the highest point of a prefill of `rows` sequences.

    transformers' generate asks for the logits of the last position only (logits_to_keep=1, which
    every causal model of version 5 takes), and copies them to float32 to choose from.
    """
    size = ITEMSIZE_BYTES[spec.dtype]
    hidden = rows * prompt_tokens * spec.hidden_size * size
    scores = 0
    if spec.model_type in EAGER_ATTENTION:
        scores = (
            rows
            * spec.num_attention_heads
            * prompt_tokens
            * prompt_tokens
            * max(size, 4)
            * EAGER_SCORE_COPIES
        )
    attention = ATTENTION_HIDDEN_COPIES * hidden + scores
    feed_forward = HIDDEN_COPIES * hidden + feed_forward_bytes(spec, rows * prompt_tokens)
    logits = rows * spec.vocab_size * (size + 2 * 4)
    largest = {"hidden states": ATTENTION_HIDDEN_COPIES * hidden, "attention scores": scores}
    if feed_forward > attention:
        largest = {
            "hidden states": HIDDEN_COPIES * hidden,
            "feed-forward states": feed_forward - HIDDEN_COPIES * hidden,
        }
    if logits > sum(largest.values()):
        largest = {"logits of the last position": logits}
    return largest


def feed_forward_bytes(spec: ModelSpec, tokens: int) -> int:
    """Return the bytes of the states of one layer's feed-forward block for that many tokens.

    A token counts once for each expert that it uses.
    """
    size = ITEMSIZE_BYTES[spec.dtype]
    width = spec.intermediate_size or 4 * spec.hidden_size
    copies = (
        BLOOM_COPIES
        if spec.model_type == "bloom"
        else PLAIN_COPIES
        if spec.model_type in PLAIN_FEED_FORWARD
        else GATED_COPIES
    )
    return tokens * (spec.experts_per_token or 1) * width * copies * size
