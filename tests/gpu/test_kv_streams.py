"""Copies and computation that are late by turns change no token: streams wait for each other.

torch.cuda._sleep keeps a stream busy for so many clock cycles. A slow copy stream shows a reader
that does not wait for it, a slow computation shows a copy that overtakes it.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.worker.kv_cache.cache import HostCache
from zinfer.worker.kv_cache.layers import HostLayer
from zinfer.worker.kv_cache.memory import Lanes
from zinfer.worker.kv_cache.routes import attached
from zinfer.worker.kv_cache.store import Format

PROMPT, NEW = 13, 210
LONG = 2_000_000
"""Clock cycles, about a millisecond: many times what a tiny layer or its copy takes."""
PLACEMENTS = ["host", "host_attention"]


def generated(model: Any, new: int = NEW, **more: Any) -> torch.Tensor:
    ids, mask = (each.to("cuda") for each in padded_prompts())
    settings = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True}
    with torch.no_grad():
        return model.generate(input_ids=ids, attention_mask=mask, **settings, **more).cpu()


def slow(monkeypatch: pytest.MonkeyPatch, who: str) -> None:
    """Delay the copy stream, the computation, or either at random."""
    chance = random.Random(0)
    copying, update = Lanes.copying, HostLayer.update

    def late(stream: str) -> bool:
        return who == stream or (who == "either" and chance.random() < 0.3)

    @contextlib.contextmanager
    def slow_copying(self: Lanes) -> Iterator[None]:
        with copying(self):
            if late("copies"):
                torch.cuda._sleep(LONG)
            yield

    def slow_update(self: HostLayer, *args: Any, **kwargs: Any) -> Any:
        if late("computation"):
            torch.cuda._sleep(LONG)
        return update(self, *args, **kwargs)

    monkeypatch.setattr(Lanes, "copying", slow_copying)
    monkeypatch.setattr(HostLayer, "update", slow_update)


@pytest.mark.parametrize("pin", [True, False], ids=["pinned", "pageable"])
@pytest.mark.parametrize("who", ["copies", "computation", "either"])
@pytest.mark.parametrize("placement", PLACEMENTS)
@pytest.mark.parametrize("family", ["opt", "llama", "mistral_window", "gpt_oss", "bloom"])
def test_delayed_streams_change_no_token(
    family: str, placement: str, who: str, pin: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model(family).to("cuda")
    expected = generated(model)
    cache = HostCache(model.config, capacity=PROMPT + NEW, placement=placement, pin=pin)
    slow(monkeypatch, who)
    with attached(model, cache):
        for _ in range(2):
            assert torch.equal(generated(model, past_key_values=cache), expected)
            cache.reset()


@pytest.mark.parametrize("bits", [8, 4])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_delayed_streams_change_no_token_of_codes(
    placement: str, bits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny_model("llama").to("cuda")
    stored = Format(bits=bits, group_size=16)

    def tokens() -> torch.Tensor:
        cache = HostCache(
            model.config, capacity=PROMPT + 60, placement=placement, pin=True,
            keys=stored, values=stored,
        )  # fmt: skip
        with attached(model, cache):
            return generated(model, 60, past_key_values=cache)

    expected = tokens()
    slow(monkeypatch, "either")
    assert torch.equal(tokens(), expected)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_delayed_streams_change_no_beam(placement: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("llama").to("cuda")
    expected = generated(model, 40, num_beams=3)
    cache = HostCache(model.config, capacity=PROMPT + 40, placement=placement, pin=True)
    slow(monkeypatch, "either")
    with attached(model, cache):
        assert torch.equal(generated(model, 40, num_beams=3, past_key_values=cache), expected)


def test_host_keeps_two_layers_on_the_device() -> None:
    model = tiny_model("llama", num_hidden_layers=8).to("cuda")
    cache = HostCache(model.config, capacity=PROMPT + 40, placement="host", pin=True)
    generated(model, 40, past_key_values=cache)
    assert cache.memory.device_bytes == 2 * cache.memory.host_bytes // 8
