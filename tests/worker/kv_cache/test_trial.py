"""An architecture that is not tested with zinfer is tried on a tiny model before it is loaded."""

from __future__ import annotations

from types import ModuleType

import pytest
import torch
from transformers import AutoConfig

from tests.helpers.composing import composed
from tests.helpers.tiny_models import FAMILIES, tiny_model
from zinfer.config import ConfigError
from zinfer.worker.kv_cache import cache as cache_module
from zinfer.worker.kv_cache import kernel, packer
from zinfer.worker.kv_cache.trial import TESTED, require_trial, trial


def test_the_families_called_tested_are_those_of_the_tests() -> None:
    assert {tiny_model(family).config.model_type for family in FAMILIES} == TESTED


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize(
    "model_type",
    ["qwen2", "olmo2", "cohere2", "granite", "stablelm", "starcoder2", "phi", "glm4", "biogpt",
     "gemma", "exaone4", "smollm3", "llama4_text", "xglm", "gpt_bigcode", "persimmon", "olmoe",
     "jamba", "minicpm3", "mimo_v2_flash"],
)  # fmt: skip
def test_other_families_pass_the_trial(model_type: str, placement: str) -> None:
    real = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    assert trial(real, composed(f"kv_cache={placement}")) is None


@pytest.mark.parametrize(
    ("model_type", "says"),
    [
        ("mamba", "no layer of keys and values"),
        ("minimax", "cache of its own"),
        ("gemma3n_text", "other tokens"),  # layers share what an earlier one had copied back
    ],
)
def test_what_keeps_no_keys_and_values_fails_it_with_the_reason(model_type: str, says: str) -> None:
    real = AutoConfig.for_model(model_type).get_text_config(decoder=True)
    assert says in str(trial(real, composed("kv_cache=host")))


def test_a_cache_that_loses_a_token_is_found_and_the_run_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    attend = cache_module.HostAttention.attend

    def forgets(
        self: object, query: object, keys: object, values: object, tokens: int, how: object
    ) -> torch.Tensor:
        return attend(self, query, keys, values, tokens - 1, how)  # type: ignore[arg-type]

    monkeypatch.setattr(cache_module.HostAttention, "attend", forgets)
    config = composed(
        "model=custom", "+model.model_type=qwen2", "kv_cache=host_attention", "model.name=mine",
        "+model.overrides.num_hidden_layers=2",
    )  # fmt: skip
    with pytest.raises(ConfigError, match=r"kv_cache=host_attention: qwen2 .* Set kv_cache=device"):
        require_trial(config)


@pytest.mark.parametrize(
    ("module", "settings"),
    [
        (kernel, ("kv_cache=host_attention",)),
        (packer, ("kv_cache=host", "kv_cache.bits=8", "kv_cache.group_size=32")),
    ],
    ids=["attention", "packing"],
)
def test_a_kernel_that_was_asked_for_and_cannot_be_compiled_is_refused(
    module: ModuleType, settings: tuple[str, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "library", lambda: "no C++ compiler was found")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler was found. Set kv_cache.kernel=auto"):
        require_trial(composed("model=tiny-llama", "kv_cache.kernel=compiled", *settings))
    assert require_trial(composed("model=tiny-llama", *settings)) is None
