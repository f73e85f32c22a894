"""A checkpoint that is not the model's never becomes a result."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from tests.helpers.checkpoints import FAULTY, NOT_NUMBERS, WHOLE, base
from tests.helpers.composing import composed
from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.pretrained import open_checkpoint, pretrained_model, verify
from zinfer.model.weights.verified import (
    WHOLE_NUMEL,
    VerifiedWeights,
    is_finite,
    pick,
    sampled,
    weight_faults,
    windows,
)


def loaded(folder: Path, log: Path, *overrides: str) -> tuple[object, VerifiedWeights]:
    model = composed("model=custom", f"model.source={folder}", *overrides).model
    log.mkdir()
    events = EventLog(log)
    opened = open_checkpoint(model, torch.float32, events)
    read = pretrained_model(opened, torch.float32, events)
    return read.model, verify(opened, read, events)


def warnings(log: Path) -> list[str]:
    events = [json.loads(line) for line in (log / "events.jsonl").read_text().splitlines()]
    return [event["message"] for event in events if event["event"] == "warning"]


@pytest.mark.parametrize("name", FAULTY)
def test_what_is_not_the_models_is_refused_with_file_tensors_and_numbers(
    name: str, tmp_path: Path
) -> None:
    write, said = FAULTY[name]
    with pytest.raises(ConfigError, match=said) as refused:
        loaded(write(tmp_path / name), tmp_path / "log")
    assert ("pickle" in str(refused.value)) == name.startswith("pickle_")
    assert str(tmp_path) in str(refused.value) or name == "vocab_mismatch"


@pytest.mark.parametrize("name", NOT_NUMBERS)
def test_what_is_no_number_ends_the_run_and_names_the_tensor(name: str, tmp_path: Path) -> None:
    write, said = NOT_NUMBERS[name]
    with pytest.raises(WrongWeights, match=said):
        loaded(write(tmp_path / name), tmp_path / "log")


@pytest.mark.parametrize("name", WHOLE)
def test_what_is_the_models_loads_completely_however_it_is_named(name: str, tmp_path: Path) -> None:
    model, proof = loaded(WHOLE[name](tmp_path / name), tmp_path / "log")
    family = {"experts": "mixtral", "buffers": "deepseek_v3"}.get(name, "llama")
    held = model.state_dict()  # type: ignore[attr-defined]
    published = base(family)[1]
    for key, tensor in held.items():
        source = "model.embed_tokens.weight" if name.startswith("tied_") and "head" in key else key
        if source in published:
            assert torch.equal(tensor, published[source]), key
    unique = {id(each): each for each in model.parameters()}.values()  # type: ignore[attr-defined]
    buffers = sum(each.nbytes for key, each in held.items() if "correction_bias" in key)
    assert proof.bytes == sum(each.nbytes for each in unique) + buffers
    assert proof.sha256 is not None and len(proof.sha256) == 64
    renamed = name.endswith(("prefix", "prefixes", "llava")) and name != "without_base_prefix"
    assert bool(warnings(tmp_path / "log")) == renamed


def test_a_pickle_that_is_trusted_is_verified_too(tmp_path: Path) -> None:
    folder = FAULTY["pickle_only"][0](tmp_path / "pickled")
    _, proof = loaded(folder, tmp_path / "log", "model.allow_pickle=true")
    assert proof.tensors == 29
    held = torch.load(folder / "pytorch_model.bin")
    del held["model.norm.weight"]
    torch.save(held, folder / "pytorch_model.bin")
    with pytest.raises(ConfigError, match=r"lacks 1 tensors of llama \(model\.norm\.weight\)"):
        loaded(folder, tmp_path / "log2", "model.allow_pickle=true")


def test_a_pickle_that_was_saved_while_training_is_refused(tmp_path: Path) -> None:
    folder = FAULTY["pickle_of_a_training"][0](tmp_path / "pickled")
    said = r"pytorch_model\.bin holds more than tensors \(epoch, model\).*model\.state_dict"
    with pytest.raises(ConfigError, match=said):
        loaded(folder, tmp_path / "log", "model.allow_pickle=true")


def test_the_hash_is_of_headers_and_sizes(tmp_path: Path) -> None:
    first = loaded(WHOLE["base"](tmp_path / "a"), tmp_path / "log_a")[1]
    second = loaded(WHOLE["base"](tmp_path / "b"), tmp_path / "log_b")[1]
    other = loaded(WHOLE["old_inv_freq"](tmp_path / "c"), tmp_path / "log_c")[1]
    assert first.sha256 == second.sha256 != other.sha256


def test_a_repository_of_the_hub_s_cache_is_checked_like_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from transformers.utils import hub

    repository = tmp_path / "models--example--llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    snapshot = repository / "snapshots" / ("0" * 40)
    FAULTY["one_layer_missing"][0](snapshot)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(hub.constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ConfigError, match="lacks 13 tensors of llama"):
        loaded(Path("example/llama"), tmp_path / "log")


def test_weights_that_were_lost_after_they_were_read_are_found(tmp_path: Path) -> None:
    """As under zero.Init: what was read is noted, and compared with what the model holds."""
    events = EventLog(tmp_path)
    layer = torch.nn.Sequential(torch.nn.Linear(512, 512), torch.nn.LayerNorm(512))
    state = {name: torch.randn_like(each) for name, each in layer.state_dict().items()}
    with sampled(ranks=2) as samples:
        layer.load_state_dict(state)
    assert weight_faults(layer, events, samples=samples) == []
    with torch.no_grad():
        layer[0].weight[256].add_(1.0)
        layer[1].bias.zero_()
    assert weight_faults(layer, events, samples=samples) == [
        "2 tensors do not hold the checkpoint's values (0.weight, 1.bias)"
    ]
    with sampled(ranks=2) as samples:
        layer.load_state_dict({"0.weight": state["0.weight"]}, strict=False)
    assert weight_faults(layer, events, samples=samples) == [
        "3 tensors were never read from the checkpoint and are random (0.bias, 1.bias, 1.weight)"
    ]


@pytest.mark.parametrize("numel", [1, 1000, WHOLE_NUMEL, WHOLE_NUMEL + 1, 1_000_003])
@pytest.mark.parametrize("ranks", [1, 2, 7])
def test_windows_lie_in_the_tensor_and_touch_both_ends_of_each_partition(
    numel: int, ranks: int
) -> None:
    places = windows(numel, ranks)
    touched = {element for start, stop in places for element in (start, stop - 1)}
    assert all(0 <= start < stop <= numel for start, stop in places)
    each = -(-numel // ranks)
    if numel > WHOLE_NUMEL:
        assert all(min(part * each, numel - 1) in touched for part in range(ranks))
    assert numel - 1 in touched
    assert pick(torch.arange(numel), ranks)[-1] == numel - 1


@pytest.mark.parametrize(("numel", "ranks"), [(7, 3), (65_536, 2), (65_537, 4), (200_000, 150)])
def test_what_the_ranks_compare_of_their_own_parts_is_what_one_would_of_all(
    numel: int, ranks: int
) -> None:
    def places(part: int | None) -> set[int]:
        return {each for first, last in windows(numel, ranks, part) for each in range(first, last)}

    each = -(-numel // ranks)
    for rank in range(ranks):
        assert places(rank) == {place for place in places(None) if place // each == rank}


def test_a_sum_that_overflows_is_not_taken_for_infinity() -> None:
    assert is_finite(torch.full((16,), 3e38))
    assert is_finite(torch.tensor([], dtype=torch.float16))
    assert not is_finite(torch.tensor([float("inf"), float("-inf")]))
