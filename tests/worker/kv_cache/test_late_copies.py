"""Copies that run as late as they may change no token: every reader waits for what it reads."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.helpers.late_copies import LateLanes, PretendsToPin
from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.worker.kv_cache.cache import HostCache
from zinfer.worker.kv_cache.layers import HostLayer
from zinfer.worker.kv_cache.memory import Memory
from zinfer.worker.kv_cache.routes import attached
from zinfer.worker.kv_cache.store import Format

PROMPT, NEW = 13, 24


def generated(model: Any, **more: Any) -> torch.Tensor:
    ids, mask = padded_prompts()
    settings = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more)


def late_cache(model: Any, placement: str, *, pinned: bool, **more: Any) -> HostCache:
    cache = HostCache(model.config, capacity=PROMPT + NEW, placement=placement, **more)
    cache.memory = PretendsToPin(pin=True) if pinned else Memory(pin=False)
    cache._lanes = LateLanes()
    return cache


def ran_and_left(cache: HostCache) -> tuple[int, int]:
    lanes = cache._lanes
    assert isinstance(lanes, LateLanes)
    return lanes.done, len(lanes.noted)


@pytest.mark.parametrize("pinned", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["opt", "llama", "mistral_window", "gpt_oss", "bloom"])
def test_late_copies_change_no_token(family: str, placement: str, pinned: bool) -> None:
    model = tiny_model(family)
    expected = generated(model)
    cache = late_cache(model, placement, pinned=pinned)
    with attached(model, cache):
        for _ in range(2):
            assert torch.equal(generated(model, past_key_values=cache), expected)
            cache.reset()
    done, noted = ran_and_left(cache)
    assert 0 < done <= noted


@pytest.mark.parametrize("bits", [8, 4])
def test_late_copies_of_codes_change_no_token(bits: int) -> None:
    model, stored = tiny_model("llama"), Format(bits=bits, group_size=16)
    punctual = HostCache(
        model.config, capacity=PROMPT + NEW, placement="host", keys=stored, values=stored
    )
    expected = generated(model, past_key_values=punctual)
    cache = late_cache(model, "host", pinned=True, keys=stored, values=stored)
    assert torch.equal(generated(model, past_key_values=cache), expected)


def test_late_copies_of_beams_change_no_token() -> None:
    model = tiny_model("llama")
    expected = generated(model, num_beams=3)
    cache = late_cache(model, "host", pinned=True)
    assert torch.equal(generated(model, num_beams=3, past_key_values=cache), expected)


@pytest.mark.parametrize("forgotten", ["computed_after", "settle"])
def test_a_reader_that_does_not_wait_is_found(
    forgotten: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama")
    expected = generated(model)
    cache = late_cache(model, "host", pinned=False)
    owner: Any = LateLanes if forgotten == "computed_after" else HostLayer
    monkeypatch.setattr(owner, forgotten, lambda *_: None)
    assert not torch.equal(generated(model, past_key_values=cache), expected)


def test_a_long_prompt_holds_few_layers_twice() -> None:
    model = tiny_model("llama", num_hidden_layers=8)
    cache = late_cache(model, "host_attention", pinned=True)
    ids, mask = padded_prompts()
    with torch.no_grad(), attached(model, cache):
        model(input_ids=ids, attention_mask=mask, past_key_values=cache)
    assert sum(bool(layer._waiting) for layer in cache.on_host) <= 2
