"""Scores of a text: exact where nothing is rounded, worse where KV bits round, never hidden."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

from tests.helpers import scoring
from tests.helpers.planning import planned
from tests.helpers.scoring import NEW, PREFILLED, pieces
from tests.helpers.tiny_models import tiny_model
from zinfer.config import ConfigError, QualityConfig
from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import read_checkpoint
from zinfer.worker.quality import (
    ROWS,
    TEXT_FILE,
    compared,
    cut,
    keep_scores,
    no_reference,
)
from zinfer.worker.quality_scores import Scores, divergence, read_scores, scores_of, write_scores
from zinfer.worker.run import text_to_score


def read(tmp_path: Path, family: str, *overrides: str, reference: Scores | None = None) -> Scores:
    """Read the pieces with a tiny model of this family."""
    return scoring.read(tmp_path, tiny_model(family), *overrides, reference=reference)


@pytest.mark.parametrize("family", ["llama", "opt", "gpt_oss", "bloom"])
def test_scores_are_those_of_one_forward_pass_over_the_whole_text(
    family: str, tmp_path: Path
) -> None:
    ids = pieces().ids
    with torch.no_grad():
        logits = tiny_model(family)(input_ids=ids).logits[:, PREFILLED:-1]
    expected = logits.log_softmax(-1).gather(2, ids[:, PREFILLED + 1 :, None])[..., 0]
    found = read(tmp_path, family)
    assert found.loss.shape == (ROWS, NEW - 1)
    torch.testing.assert_close(found.loss, -expected, rtol=1e-4, atol=1e-4)
    assert torch.equal(found.likeliest, logits.argmax(-1))


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("family", ["llama", "gpt_oss", "bloom"])
def test_a_cache_in_host_memory_changes_nothing_in_float32(
    family: str, placement: str, tmp_path: Path
) -> None:
    reference = read(tmp_path, family)
    mine = read(tmp_path, family, f"kv_cache={placement}", reference=reference)
    quality = compared(reference, mine, QualityConfig())
    assert (quality.verdict, quality.token_agreement) == ("ok", 1.0)
    assert quality.kl_divergence < 1e-6
    assert quality.perplexity_ratio == pytest.approx(1, abs=1e-5)


def test_fewer_bits_of_keys_or_values_cost_more(tmp_path: Path) -> None:
    """Compare losses: so small a model's divergence in 8 bits is below float32's rounding."""
    reference = read(tmp_path, "llama")
    host, group = "kv_cache=host_attention", "kv_cache.group_size=16"
    cost = {}
    for key, value in ((16, 16), (8, 16), (16, 8), (4, 16), (16, 4)):
        bits = (f"kv_cache.key_bits={key}", f"kv_cache.value_bits={value}")
        mine = read(tmp_path, "llama", host, group, *bits, reference=reference)
        cost[key, value] = float((mine.loss - reference.loss).abs().mean())
    assert cost[16, 16] < 1e-5
    assert 10 * cost[16, 16] < cost[8, 16] < cost[4, 16] / 4
    assert 10 * cost[16, 16] < cost[16, 8] < cost[16, 4] / 4


class Rounding(DynamicCache):
    """Keeps keys and values rounded by the plain formula; the prefill attends to exact ones."""

    bits = (16, 16)
    group = 16

    def rounded(self, values: torch.Tensor, bits: int) -> torch.Tensor:
        if bits == 16:
            return values
        groups = values.unflatten(-1, (-1, self.group))
        least = groups.amin(-1, keepdim=True).half().float()
        step = ((groups.amax(-1, keepdim=True) - least) / (2**bits - 1)).half().float()
        return (((groups - least) / step).round().clamp(0, 2**bits - 1) * step + least).flatten(-2)

    def update(self, keys: Any, values: Any, layer: int, *more: Any, **named: Any) -> Any:
        is_prefill = self.get_seq_length(layer) == 0
        kept = super().update(
            self.rounded(keys, self.bits[0]), self.rounded(values, self.bits[1]), layer
        )
        return (keys, values) if is_prefill else kept


@pytest.mark.parametrize("placement", ["host", "host_attention"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 4), (4, 16), (16, 4)])
def test_scores_of_fewer_bits_are_those_of_the_plain_formula(
    bits: tuple[int, int], placement: str, tmp_path: Path
) -> None:
    ids, model = pieces().ids, tiny_model("llama")
    cache = Rounding(config=model.config)
    cache.bits = bits
    losses = []
    with torch.no_grad():
        model(input_ids=ids[:, :PREFILLED], past_key_values=cache)
        for place in range(PREFILLED, ids.shape[1] - 1):
            logits = model(input_ids=ids[:, place : place + 1], past_key_values=cache).logits
            expected = logits[:, 0].log_softmax(-1)
            losses.append(-expected.gather(1, ids[:, place + 1, None])[:, 0])
    key, value = (
        f"kv_cache.{name}_bits={n}" for name, n in zip(("key", "value"), bits, strict=True)
    )
    found = read(tmp_path, "llama", f"kv_cache={placement}", key, value, "kv_cache.group_size=16")
    # A value midway between two codes may be rounded either way: a few predictions differ a little.
    apart = (found.loss - torch.stack(losses, 1)).abs()
    if placement == "host_attention":  # `host` attends to the newest token as it was computed
        assert apart.median() < 1e-3
        assert (apart < 0.02).double().mean() > 0.95
    assert found.loss.mean() == pytest.approx(float(torch.stack(losses, 1).mean()), abs=0.05)


@pytest.mark.parametrize("vocabulary", [2, 3, 257, 1000])
def test_divergence_is_that_of_the_definition(vocabulary: int) -> None:
    torch.manual_seed(vocabulary)
    logits, target = torch.randn(2, 4, vocabulary), torch.zeros(4, dtype=torch.long)
    first = scores_of(logits[0], target)
    second = scores_of(logits[1], target, first.ids)
    whole = torch.nn.functional.kl_div(
        logits[1].log_softmax(-1), logits[0].log_softmax(-1), log_target=True, reduction="batchmean"
    )
    assert divergence(first, first) == 0
    if vocabulary <= 257:
        assert divergence(first, second) == pytest.approx(float(whole), rel=1e-4)
    assert 0 < divergence(first, second) <= float(whole) * 1.0001


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"min_agreement": 0.0, "max_perplexity_ratio": 1e6}, ()),
        ({"min_agreement": 1.0, "max_perplexity_ratio": 1e6}, ("quality.min_agreement",)),
        ({"min_agreement": 0.0, "max_perplexity_ratio": 1e-6}, ("quality.max_perplexity_ratio",)),
        (
            {"min_agreement": 1.0, "max_perplexity_ratio": 1e-6},
            ("quality.min_agreement", "quality.max_perplexity_ratio"),
        ),
    ],
)
def test_each_limit_that_is_passed_is_named(limits: dict[str, float], named: Any) -> None:
    torch.manual_seed(0)
    target = torch.zeros(50, dtype=torch.long)
    first = scores_of(torch.randn(50, 9), target)
    second = scores_of(torch.randn(50, 9), target, first.ids)
    quality = compared(first, second, QualityConfig(**limits))
    assert quality.verdict == ("beyond_limits" if named else "ok")
    assert len(quality.reasons) == len(named)
    assert all(name in reason for name, reason in zip(named, quality.reasons, strict=True))


def test_a_model_whose_logits_are_no_numbers_is_beyond_the_limits() -> None:
    target = torch.zeros(3, dtype=torch.long)
    first = scores_of(torch.randn(3, 9), target)
    broken = scores_of(torch.full((3, 9), torch.nan), target, first.ids)
    quality = compared(first, broken, QualityConfig())
    assert quality.verdict == "beyond_limits"
    assert "quality_perplexity" not in quality.metrics()
    json.dumps(quality.metrics(), allow_nan=False)


def test_kept_scores_come_back_and_broken_files_do_not(tmp_path: Path) -> None:
    found = read(tmp_path, "llama")
    path = tmp_path / "quality" / "scores.safetensors"
    assert read_scores(path, (ROWS, NEW - 1)) is None
    write_scores(path, found, {"weights": "abc"})
    back = read_scores(path, (ROWS, NEW - 1))
    assert back is not None
    for item in dataclasses.fields(Scores):
        assert torch.equal(getattr(back, item.name), getattr(found, item.name))
    assert read_scores(path, (ROWS, NEW)) is None
    path.write_bytes(path.read_bytes()[:-1000])
    assert read_scores(path, (ROWS, NEW - 1)) is None
    assert [each.name for each in path.parent.iterdir()] == [path.name], "nothing half-written"


def test_a_flipped_byte_of_kept_scores_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "scores.safetensors"
    write_scores(path, read(tmp_path, "llama"), {"weights": "abc"})
    raw = bytearray(path.read_bytes())
    raw[-5] ^= 1
    path.write_bytes(raw)
    assert read_scores(path, (ROWS, NEW - 1)) is None


def test_scores_that_cannot_be_kept_do_not_end_a_run(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    path = tmp_path / "file" / "quality" / "scores.safetensors"
    keep_scores(path, read(tmp_path, "llama"), {"weights": "abc"}, EventLog(tmp_path, 0, "a"))
    assert "cannot be kept" in noted(tmp_path)


def test_weights_of_the_same_shapes_have_another_fingerprint(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "same")
    first = model.state_dict()
    for number, name in enumerate(first):  # one tensor at a time
        with torch.no_grad():
            model.get_parameter(name).mul_(1.01)
            model.save_pretrained(tmp_path / str(number))
            model.get_parameter(name).div_(1.01)
    one, same, *tuned = (
        read_checkpoint(tmp_path / name, allow_pickle=False)
        for name in ("one", "same", *map(str, range(len(first))))
    )
    assert {each.sha256 for each in tuned} == {one.sha256}, "headers do not tell them apart"
    assert one.fingerprint() == same.fingerprint()
    assert one.fingerprint() not in {each.fingerprint() for each in tuned}


class Words:
    """A tokenizer with a token for each word, and one before each text."""

    bos_token_id = 1

    def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, list[int]]:
        ids = [len(word) + 2 for word in text.split()]
        return {"input_ids": [1, *ids] if add_special_tokens else ids}


def test_the_text_is_long_enough_for_every_tokenizer_and_cut_into_equal_rows() -> None:
    assert len(TEXT_FILE.read_text(encoding="utf-8").split()) >= 2000
    made = cut(Words(), 2048)
    assert made.ids.shape == (ROWS, 1 + 2048 // ROWS)
    assert (made.ids[:, 0] == 1).all()
    assert cut(Words(), 2048, most=64).ids.shape == (ROWS, 64)
    with pytest.raises(ConfigError, match=r"the text has \d+. Set quality.tokens="):
        cut(Words(), 10_000)


def test_quantised_weights_without_a_reference_say_how_to_make_one() -> None:
    assert "Set dtype=bfloat16 once" in no_reference("bfloat16")


def test_dummy_weights_are_refused_before_anything_starts(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "zinfer", "quality.enabled=true", "tracking=none"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert "weights=dummy are random" in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


def noted(folder: Path) -> str:
    return (folder / "events.jsonl").read_text() if (folder / "events.jsonl").exists() else ""


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (("model=tiny-llama", "weights=dummy"), ""),
        (("model=llama-3-8b", "weights=pretrained"), "parameters take long"),
        (("model=opt-1.3b", "weights=pretrained", "offload=nvme"), "parameters take long"),
        (("model=opt-350m", "weights=pretrained"), "not scored: quality.enabled=true:"),
    ],
    ids=["random weights", "a large model", "one that is read from a disk", "no tokenizer"],
)
def test_a_preset_scores_only_where_it_can_and_says_why_not(
    overrides: tuple[str, ...], said: str, tmp_path: Path
) -> None:
    run = planned(*overrides, "quality.enabled=auto", "hardware.accelerator=cpu")
    assert text_to_score(run, EventLog(tmp_path)) is None
    assert said in noted(tmp_path) and bool(said) == bool(noted(tmp_path))
