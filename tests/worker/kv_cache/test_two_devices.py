"""On a simulated second device nothing mixes devices, and what is copied is counted in bytes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import FAMILIES, padded_prompts, tiny_model
from tests.helpers.two_devices import MOVED, DeviceTensor, move_to_device, two_devices
from zinfer.worker.kv_cache.cache import HostCache
from zinfer.worker.kv_cache.routes import attached
from zinfer.worker.kv_cache.store import Format

NEW, PROMPT, ROWS = 12, 13, 3
CANNOT_SIMULATE: dict[str, str] = {
    "falcon": "its rotary embedding uses an operator that the simulation lacks",
}


def generated(model: Any, ids: Any, mask: Any, **more: Any) -> torch.Tensor:
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more)


def placed(
    family: str, placement: str, **more: Any
) -> tuple[HostCache, torch.Tensor, torch.Tensor]:
    """Generate with the model on the second device: the cache, its tokens, the plain model's."""
    model = tiny_model(family)
    ids, mask = padded_prompts()
    expected = generated(model, ids, mask)
    move_to_device(model)
    cache = HostCache(model.config, capacity=PROMPT + NEW - 1, placement=placement, **more)
    with two_devices():
        on_device = DeviceTensor(ids), DeviceTensor(mask)
        with attached(model, cache):
            MOVED.update(to_host=0, to_device=0)
            tokens = generated(model, *on_device, past_key_values=cache).data_on_cpu
    return cache, tokens, expected


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", sorted(set(FAMILIES) - set(CANNOT_SIMULATE)))
def test_no_operator_mixes_the_devices(family: str, placement: str) -> None:
    if family == "deepseek_v3" and placement == "host_attention":
        pytest.skip("MLA expands its cache with weights of the device: `host` only")
    _, tokens, expected = placed(family, placement)
    assert torch.equal(tokens, expected)


LAYERS, KV_HEADS, HEADS, DIM, FLOAT = 3, 2, 4, 16, 4
TOKEN_BYTES = LAYERS * 2 * ROWS * KV_HEADS * DIM * FLOAT
"""One token of all rows and layers, keys and values, of the tiny LLaMA."""


def test_host_moves_each_token_once_to_the_host_and_back_once_a_step() -> None:
    cache, _, _ = placed("llama", "host")
    tokens = PROMPT + NEW - 1
    assert cache.memory.traffic.to_host_bytes == tokens * TOKEN_BYTES
    steps = range(PROMPT, tokens)  # a step fetches all that came before it
    fetched = sum(steps) * TOKEN_BYTES
    ahead = tokens * TOKEN_BYTES // LAYERS  # after the last step the first layer is fetched again
    assert cache.memory.traffic.to_device_bytes == fetched + ahead


def test_host_attention_moves_queries_new_tokens_and_outputs_only() -> None:
    cache, _, _ = placed("llama", "host_attention")
    steps = NEW - 1
    query = LAYERS * ROWS * HEADS * DIM * FLOAT * steps
    masks = sum(ROWS * (PROMPT + step) for step in range(1, NEW))  # one byte a token, once a step
    traffic = cache.memory.traffic
    assert traffic.to_host_bytes == (PROMPT + steps) * TOKEN_BYTES + query + masks
    assert traffic.to_device_bytes == query
    assert traffic.attention_calls == LAYERS * steps


@pytest.mark.parametrize(("bits", "values_a_byte"), [(8, 1), (4, 2)])
def test_quantised_tokens_travel_packed(bits: int, values_a_byte: int) -> None:
    stored = Format(bits=bits, group_size=DIM)
    cache, _, _ = placed("llama", "host", keys=stored, values=stored)
    a_head = DIM // values_a_byte + 4  # codes, and a scale and a minimum in float16
    tokens = PROMPT + NEW - 1
    expected = tokens * LAYERS * 2 * ROWS * KV_HEADS * a_head
    assert cache.memory.traffic.to_host_bytes == expected
    assert cache.host_bytes == expected, "the buffers hold every token and nothing else"


@pytest.mark.parametrize("placement", ["host", "host_attention"])
def test_windows_hold_their_window_and_nothing_else(placement: str) -> None:
    cache, _, _ = placed("mistral_window", placement)
    assert cache.host_bytes == 8 * TOKEN_BYTES
    slots = 2 * 8 * TOKEN_BYTES // LAYERS if placement == "host" else 0
    assert cache.memory.device_bytes == slots
