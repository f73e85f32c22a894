"""Linear layers of unmodified models that multiply a few rows by our kernel."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from tests.helpers.tiny_models import padded_prompts, tiny_model
from zinfer.worker.quantised import native
from zinfer.worker.skinny import modules
from zinfer.worker.skinny.modules import own_products_up_to, use_own_products

FAMILIES = ("llama", "opt", "bloom", "qwen3", "gptj", "gpt_neox", "falcon", "gpt2")
OWN_FORWARDS = ("falcon", "gpt2")
"""Families whose decoder layers have classes of their own for products: left as they are."""


@pytest.fixture(autouse=True)
def _needs_the_kernel() -> None:
    if isinstance(reason := native.library(), str):
        pytest.skip(f"needs the compiled kernel: {reason}")


def shapes_of(model: nn.Module) -> set[tuple[int, int]]:
    return {tuple(each.weight.shape) for each in model.modules() if isinstance(each, nn.Linear)}  # type: ignore[misc]


def counted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Note the rows of every product that our kernel makes."""
    rows: list[int] = []
    real = modules.own_linear

    def noting(x: torch.Tensor, *more: Any) -> torch.Tensor:
        rows.append(x.numel() // x.shape[-1])
        return real(x, *more)

    monkeypatch.setattr(modules, "own_linear", noting)
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_a_decode_step_agree_within_the_tolerance_of_16_bits(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both ways must be as near to float32 as each other: two roundings of the same sums."""
    ids, mask = padded_prompts()
    rows = counted(monkeypatch)
    exact = tiny_model(family)
    plain, own = (tiny_model(family).bfloat16() for _ in range(2))
    layers = use_own_products(own, shapes_of(own), rows=len(ids))
    logits = []
    with torch.no_grad():
        for model in (exact, plain, own):
            kept = model(ids, attention_mask=mask, use_cache=True)
            following = torch.full((len(ids), 1), 5)
            longer = torch.cat([mask, torch.ones_like(following)], 1)
            more = {"attention_mask": longer, "past_key_values": kept.past_key_values}
            logits.append(model(following, **more).logits.double())
    assert rows == [len(ids)] * layers
    assert layers >= (1 if family in OWN_FORWARDS else 3 * 4)
    scale = logits[0].norm()
    error, plain_error = ((each - logits[0]).norm() / scale for each in (logits[2], logits[1]))
    assert error < 1.5 * plain_error + 1e-3
    assert error < 0.03


def test_more_rows_than_those_of_a_decode_step_are_pytorchs(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    rows = counted(monkeypatch)
    plain = nn.Linear(64, 32, bias=True).bfloat16().requires_grad_(False)
    layer = nn.Linear(64, 32, bias=True).bfloat16().requires_grad_(False)
    layer.load_state_dict(plain.state_dict())
    assert use_own_products(nn.ModuleList([layer]), {(32, 64)}, rows=4) == 1
    assert isinstance(layer, nn.Linear) and type(layer).__name__ == "SkinnyLinear"
    x = torch.randn(2, 3, 64).bfloat16()
    assert torch.equal(layer(x), plain(x))
    assert rows == []
    layer(x[:, :2])
    assert rows == [4]
    with own_products_up_to(6, layer):
        layer(x)
    with own_products_up_to(0, layer):
        layer(x[:1, :1])
    assert rows == [4, 6]
    layer(x)
    assert rows == [4, 6]


def test_other_shapes_types_and_classes_are_left_alone() -> None:
    class Doubling(nn.Linear):
        def forward(self, input: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(input)

    layers = nn.ModuleList(
        [nn.Linear(64, 33).bfloat16(), nn.Linear(64, 32), Doubling(64, 32).bfloat16()]
    )
    assert use_own_products(layers, {(32, 64)}, rows=8) == 0
    assert [type(layer).__name__ for layer in layers] == ["Linear", "Linear", "Doubling"]


def test_packed_layers_keep_their_own_products() -> None:
    from zinfer.worker.quantised.modules import quantise_module
    from zinfer.worker.quantised.packing import Packing

    layer = nn.Linear(64, 32).bfloat16()
    packing = Packing(shape=(32, 64), is_transposed=False, bits=8, group_size=64)
    quantise_module(layer, "weight", packing, torch.bfloat16)
    assert use_own_products(nn.ModuleList([layer]), {(32, 64)}, rows=8) == 0
    assert type(layer).__name__ == "QuantisedLinear"
