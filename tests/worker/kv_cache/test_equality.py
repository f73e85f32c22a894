"""Greedy tokens with the KV cache in host memory equal those of transformers' own cache."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.helpers.tiny_models import FAMILIES, padded_prompts, tiny_model
from zinfer.worker.kv_cache.cache import HostCache
from zinfer.worker.kv_cache.layers import SequenceTooLong
from zinfer.worker.kv_cache.routes import attached
from zinfer.worker.kv_cache.store import Format

OWN_OPERATORS = {"gptj", "codegen", "bloom", "mpt", "falcon", "falcon_alibi"}
"""Families whose attention does not go through transformers' interface."""
PLACEMENTS = [("host", "auto"), ("host_attention", "auto"), ("host_attention", "torch")]
FEW, MANY = 20, 205


def generated(model: Any, ids: torch.Tensor, mask: torch.Tensor, new: int, **more: Any) -> Any:
    """Generate greedily, `new` tokens a row."""
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **{**settings, **more})


def cache_for(
    model: Any, tokens: int, placement: str, kernel: str = "auto", **more: Any
) -> HostCache:
    """A host cache for so many tokens in all."""
    return HostCache(model.config, capacity=tokens - 1, placement=placement, kernel=kernel, **more)


@pytest.mark.parametrize("padded", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize(("placement", "kernel"), PLACEMENTS)
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_tokens_are_those_of_the_models_own_cache(
    family: str, placement: str, kernel: str, padded: bool
) -> None:
    if family == "deepseek_v3" and placement == "host_attention":
        pytest.skip("MLA expands its cache with weights of the device: `host` only")
    model = tiny_model(family)
    ids, mask = padded_prompts(padded=padded)
    settings = {"output_logits": True, "return_dict_in_generate": True}
    expected = generated(model, ids, mask, FEW, **settings)
    cache = cache_for(model, 13 + FEW, placement, kernel)
    with attached(model, cache) as route:
        for _ in range(2):
            found = generated(model, ids, mask, FEW, past_key_values=cache, **settings)
            assert torch.equal(found.sequences, expected.sequences)
            error = (torch.stack(found.logits) - torch.stack(expected.logits)).abs().max()
            assert error < 1e-4, "rows of one constant token prove little: logits are compared too"
            cache.reset()
    if placement == "host_attention":
        assert route == ("operators" if family in OWN_OPERATORS else "interface")
        assert cache.memory.traffic.attention_calls > 0


@pytest.mark.slow
@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - {"deepseek_v3"}))
def test_two_hundred_tokens_are_equal_too(family: str, placement: str) -> None:
    model = tiny_model(family)
    ids, mask = padded_prompts()
    expected = generated(model, ids, mask, MANY)
    cache = cache_for(model, 13 + MANY, placement)
    with attached(model, cache):
        assert torch.equal(generated(model, ids, mask, MANY, past_key_values=cache), expected)


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["llama", "mistral_window", "gemma3", "gpt_oss", "qwen3_next"])
def test_some_layers_stay_on_the_device(family: str, placement: str) -> None:
    model = tiny_model(family)
    ids, mask = padded_prompts()
    expected = generated(model, ids, mask, FEW)
    movable = len(cache_for(model, 13 + FEW, placement).on_host)
    for device_layers in range(1, model.config.num_hidden_layers):
        cache = cache_for(model, 13 + FEW, placement, device_layers=device_layers)
        if not cache.on_host:
            continue
        assert len(cache.on_host) < movable or family == "qwen3_next"
        with attached(model, cache):
            tokens = generated(model, ids, mask, FEW, past_key_values=cache)
        assert torch.equal(tokens, expected), device_layers


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["opt", "llama", "mixtral_window", "bloom"])
def test_one_cache_serves_batches_of_other_shapes(family: str, placement: str) -> None:
    model = tiny_model(family)
    cache = HostCache(model.config, capacity=64, placement=placement)
    with attached(model, cache):
        for rows, tokens, seed in ((3, 13, 1), (5, 21, 2), (1, 7, 3), (3, 13, 1)):
            ids, mask = padded_prompts(rows, tokens, seed=seed)
            expected = generated(model, ids, mask, 12)
            assert torch.equal(generated(model, ids, mask, 12, past_key_values=cache), expected)
            cache.reset()


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["opt", "llama", "bloom", "gpt_oss", "gemma3"])
def test_beams_and_a_second_turn_are_equal(family: str, placement: str) -> None:
    model = tiny_model(family)
    ids, mask = padded_prompts()
    beams = generated(model, ids, mask, 12, num_beams=3)
    with attached(model, cache := HostCache(model.config, capacity=64, placement=placement)):
        again = generated(model, ids, mask, 12, num_beams=3, past_key_values=cache)
    assert torch.equal(again, beams)

    ids, mask = padded_prompts(2, 9, padded=False)
    more = torch.randint(2, 257, (2, 6), generator=torch.Generator().manual_seed(5))

    def two_turns(cache: Any) -> torch.Tensor:
        first = generated(model, ids, mask, 8, past_key_values=cache)
        both = torch.cat([first, more], 1)
        return generated(model, both, torch.ones_like(both), 8, past_key_values=cache)

    expected = two_turns(DynamicCache(config=model.config))
    with attached(model, cache := HostCache(model.config, capacity=64, placement=placement)):
        assert torch.equal(two_turns(cache), expected)


def test_a_longer_sequence_than_planned_is_refused_with_both_numbers() -> None:
    model = tiny_model("llama")
    ids, mask = padded_prompts()
    cache = HostCache(model.config, capacity=15, placement="host")
    with pytest.raises(SequenceTooLong, match="15 \\+ 1 tokens, and the KV cache was made for 15"):
        generated(model, ids, mask, FEW, past_key_values=cache)


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["opt", "llama", "gemma3", "bloom"])
def test_logits_with_quantised_keys_and_values_stay_close(
    family: str, placement: str, bits: int
) -> None:
    model = tiny_model(family)
    ids, mask = padded_prompts()
    settings = {"output_logits": True, "return_dict_in_generate": True}
    expected = generated(model, ids, mask, 2, **settings).logits[1]
    dim = 16
    stored = Format(bits=bits, group_size=dim)
    cache = cache_for(model, 15, placement, keys=stored, values=stored)
    with attached(model, cache):
        logits = generated(model, ids, mask, 2, past_key_values=cache, **settings).logits[1]
    error = (logits - expected).abs().max() / expected.std()
    assert 0 < error < (0.05 if bits == 8 else 1.0)
