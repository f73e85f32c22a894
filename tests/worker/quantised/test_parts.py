"""A rank reads and packs its own part of each weight; all parts together are the whole."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from tests.helpers.tiny_models import tiny_model
from zinfer.config import ConfigError, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.model.weights import dummy
from zinfer.model.weights.checkpoint import WrongWeights
from zinfer.model.weights.dummy import DummyFiller
from zinfer.model.weights.pretrained import Opened, Read, open_checkpoint
from zinfer.worker.quantised import packing as packing_module
from zinfer.worker.quantised import parts
from zinfer.worker.quantised.building import dummy_packed
from zinfer.worker.quantised.kept import kept_weights
from zinfer.worker.quantised.loading import StoredSlice, packed_model
from zinfer.worker.quantised.packing import Packing, pack
from zinfer.worker.quantised.parts import Part

BFLOAT16 = torch.bfloat16
SHAPES = [  # shape, is_transposed
    ((200, 96), False), ((4, 50, 64), False), ((96, 200), True), ((7, 320), False),
    ((131, 40), False),
]  # fmt: skip


def alone(mine: torch.Tensor) -> list[torch.Tensor]:
    raise AssertionError("nothing is to be shared")


def packing_of(shape: tuple[int, ...], is_transposed: bool, bits: int) -> Packing:
    return Packing(shape=shape, is_transposed=is_transposed, bits=bits, group_size=32)


@pytest.mark.parametrize(("shape", "is_transposed"), SHAPES)
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("ranks", [2, 3, 16])
def test_the_parts_of_all_ranks_are_the_packed_weight(
    shape: tuple[int, ...], is_transposed: bool, bits: int, ranks: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(parts, "WHOLE_BYTES", 0)
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    packing = packing_of(shape, is_transposed, bits)
    whole = pack(weight, packing, BFLOAT16)
    mine = [Part(rank=rank, ranks=ranks, gather=alone) for rank in range(ranks)]
    rows = [part.rows(packing, BFLOAT16) for part in mine]
    held = [pack(weight, packing, BFLOAT16, each) for each in rows]
    longest = max(len(each) for each in rows if each is not None)
    sent = []
    for each, packed in zip(rows, held, strict=True):
        assert each is not None
        scales = packing.split(packed)[1].reshape(-1, packing.groups * 2).view(torch.uint8)
        sent.append(torch.zeros(longest, scales.shape[1], dtype=torch.uint8))
        sent[-1][: len(each)] = scales[each.start : each.stop]
    found = []
    for rank, packed in enumerate(held):
        part = Part(rank=rank, ranks=ranks, gather=lambda _: sent)
        part.share_scales(packed, packing)
        first, last = part.span(len(whole))
        found.append(packed[first:last])
    assert torch.equal(torch.cat(found).view(torch.int16), whole.view(torch.int16))


def test_each_rank_packs_about_its_share_of_the_rows() -> None:
    packing = Packing(shape=(4096, 4096), is_transposed=False, bits=4, group_size=64)
    for ranks in (2, 4):
        taken = [
            len(Part(rank=rank, ranks=ranks, gather=alone).rows(packing, BFLOAT16) or ())
            for rank in range(ranks)
        ]
        assert 4096 <= sum(taken) <= 4096 + ranks, taken
        assert max(taken) <= 4096 / ranks * 9 / 8 + 1, "the last ranks hold the scales, a ninth"


def opened_in(folder: Path) -> Opened:
    model = ModelConfig(name="custom", source=str(folder))
    return open_checkpoint(model, torch.float32, EventLog(folder, 0, "attempt"))


def read_as(rank: int, folder: Path, *overrides: str) -> tuple[Read, dict[str, int]]:
    """Load one rank's part of a tiny checkpoint in this process; also the bytes of each read.

    What the other rank would send is zeros.
    """
    read: dict[str, int] = {}
    original = StoredSlice.__getitem__

    def counting(one: StoredSlice, index: Any) -> torch.Tensor:
        length = len(range(one._shape[0])[:None]) if one.part is None else len(one.part)
        read[one._name] = read.get(one._name, 0) + one._bytes * length // one._shape[0]
        return original(one, index)

    dtype = composed("dtype=int4", "dtype.group_size=32", *overrides).dtype
    part = Part(rank=rank, ranks=2, gather=lambda mine: [torch.zeros_like(mine)] * 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(StoredSlice, "__getitem__", counting)
        found = packed_model(
            opened_in(folder), dtype, torch.float32, lambda _: None,
            EventLog(folder, 0, "attempt"), part=part,
        )  # fmt: skip
    return found, read


@pytest.fixture
def small_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "WHOLE_BYTES", 1024)


@pytest.mark.usefixtures("small_limit")
def test_unfused_matrices_are_read_in_part_and_turned_ones_whole(tmp_path: Path) -> None:
    for family, is_cut in (("llama", True), ("gpt2", False)):
        folder = tmp_path / family
        tiny_model(family).save_pretrained(folder)
        _, read = read_as(0, folder)
        whole = {name: each.bytes for name, each in opened_in(folder).checkpoint.tensors.items()}  # type: ignore[union-attr]
        matrices = [name for name in whole if "mlp" in name and name.endswith("weight")]
        assert matrices
        for name in matrices:
            assert (read[name] < 0.65 * whole[name]) is is_cut, name


@pytest.mark.usefixtures("small_limit")
def test_the_rank_whose_rows_hold_a_nan_says_so(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tiny_model("llama").save_pretrained(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["model.layers.0.mlp.up_proj.weight"][-1, 2] = float("inf")
    save_file(tensors, path, metadata={"format": "pt"})
    read_as(0, tmp_path)
    with pytest.raises(WrongWeights, match=r"up_proj\.weight holds NaN or infinity"):
        read_as(1, tmp_path)


def test_kept_bytes_are_read_and_checked_in_pieces(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    values = torch.arange(10_000, dtype=torch.int64).to(torch.uint8)
    found = kept_weights(
        {"a": 1}, {"one": 10_000}, lambda take: take("one", values), EventLog(tmp_path)
    )
    for begin, end in ((0, 10_000), (0, 5000), (5000, 10_000), (3, 4), (9_999, 10_000), (7, 7)):
        read = found.read("one", begin, end)
        assert read is not None and torch.equal(read, values[begin:end]), (begin, end)
    with open(found.folder / "packed.safetensors", "r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(bytes([int(values[-1]) ^ 1]))
    assert found.read("one", 0, 5000) is not None
    assert found.read("one", 5000, 10_000) is None, "the damage is in this half"


def by_ranks(ranks: int, source: Path, out: Path, *overrides: str) -> list[dict[str, Any]]:
    """Load and generate on so many ranks; return what each of them wrote."""
    out.mkdir()
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = [f"--nproc-per-node={ranks}", "-m", "tests.helpers.bytes_read", source, out]
    subprocess.run(
        [*torchrun, *map(str, arguments), *overrides],
        env={**os.environ, "OMP_NUM_THREADS": "1"}, check=True, timeout=300, capture_output=True,
    )  # fmt: skip
    return [json.loads((out / f"{rank}.json").read_text()) for rank in range(ranks)]


@pytest.mark.slow
def test_two_ranks_read_half_of_a_checkpoint_each_and_say_what_one_says(
    built_ops: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "llama"
    tiny_model(
        "llama", hidden_size=256, intermediate_size=1024, num_hidden_layers=4, vocab_size=2048
    ).save_pretrained(folder)
    said = {ranks: by_ranks(ranks, folder, tmp_path / f"ranks-{ranks}") for ranks in (1, 2)}
    (one,), two = said[1], said[2]
    assert [row for rank in two for row in rank["tokens"]] == one["tokens"]
    for rank in two:
        assert rank["stored_bytes"] == pytest.approx(one["stored_bytes"] / 2, rel=0.01)
        assert rank["read_bytes"] < 0.65 * one["read_bytes"], "the last holds the scales"
    assert sum(rank["read_bytes"] for rank in two) < 1.2 * one["read_bytes"]


def test_machines_with_other_files_are_refused_on_every_rank(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from zinfer.worker.engines import zero_packed

    tiny_model("opt").save_pretrained(tmp_path)
    opened = opened_in(tmp_path)
    theirs: list[object] = [(opened.fingerprint(), None), ("another", None)]

    def gathered(into: list[object], mine: object) -> None:
        into[:] = theirs

    monkeypatch.setattr(zero_packed.comm, "get_world_size", lambda: 2)
    monkeypatch.setattr(torch.distributed, "all_gather_object", gathered)
    with pytest.raises(ConfigError, match=r"other weights on rank 1 than on rank 0"):
        zero_packed.require_one_checkpoint(opened, None)
    theirs[1] = theirs[0]
    zero_packed.require_one_checkpoint(opened, None)


FAMILIES = ("bloom", "llama", "mixtral", "gpt_oss", "deepseek_v3", "gpt2")


def placed(folder: Path, part: Part | None, weights: str) -> list[torch.Tensor]:
    """Load a checkpoint, or make random weights for its config.json.

    Return what this rank holds of each weight, in the order of loading.
    """
    held: list[torch.Tensor] = []

    def place(parameter: torch.nn.Parameter) -> None:
        flat = parameter.data.reshape(-1)
        first, last = part.span(len(flat)) if part else (0, len(flat))
        held.append(flat[first:last].clone())

    dtype = composed("dtype=int4", "dtype.group_size=32", "dtype.keep=[layers.0, h.0]").dtype
    events = EventLog(folder, 0, "attempt")
    if weights == "dummy":
        model = ModelConfig(name="custom", source=str(folder))
        spec = model_spec(model, compute_dtype="float32")
        dummy_packed(model, dtype, spec, torch.float32, place, events, part=part)
    else:
        packed_model(opened_in(folder), dtype, torch.float32, place, events, part=part)
    return held


@pytest.mark.parametrize("weights", ["pretrained", "dummy"])
@pytest.mark.parametrize("family", FAMILIES)
def test_two_ranks_hold_together_what_one_would(
    family: str, weights: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Load twice for each rank: what the first pass hands to the others, the second one gets."""
    monkeypatch.setattr(parts, "WHOLE_BYTES", 256)
    monkeypatch.setattr(dummy, "POOL_NUMEL", dummy.OFFSETS + 901)  # smaller than most weights
    tiny_model(family).save_pretrained(tmp_path, max_shard_size="100KB")
    sent: list[list[torch.Tensor]] = [[], []]

    def heard(rank: int) -> list[torch.Tensor]:
        def note(mine: torch.Tensor) -> list[torch.Tensor]:
            sent[rank].append(mine)
            return [torch.zeros_like(mine)] * 2

        placed(tmp_path, Part(rank=rank, ranks=2, gather=note), weights)
        return sent[rank]

    assert len(heard(0)) == len(heard(1)) > 0, "else they would wait for each other"
    found = []
    for rank in range(2):
        turns = iter(zip(*sent, strict=True))
        part = Part(rank=rank, ranks=2, gather=lambda _, turns=turns: next(turns))  # type: ignore[misc]
        found.append(placed(tmp_path, part, weights))
    for one, *both in zip(placed(tmp_path, None, weights), *found, strict=True):
        assert torch.equal(torch.cat(both).view(torch.int32), one.view(torch.int32))


@pytest.mark.parametrize("family", ["llama", "mixtral"])
def test_a_rank_makes_and_packs_about_half_of_random_weights(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(parts, "WHOLE_BYTES", 256)
    tiny_model(family).save_pretrained(tmp_path)
    lend, quantise = DummyFiller.lend, packing_module.quantise
    made = {"values": 0, "packed": 0}

    def lending(
        filler: DummyFiller, name: str, parameter: torch.Tensor, part: range | None = None
    ) -> None:
        lend(filler, name, parameter, part)
        share = 1.0 if part is None else len(part) / len(parameter)
        made["values"] += round(parameter.numel() * share)

    def packing(block: torch.Tensor, *settings: Any, **more: Any) -> Any:
        made["packed"] += block.numel()
        return quantise(block, *settings, **more)

    monkeypatch.setattr(DummyFiller, "lend", lending)
    monkeypatch.setattr(packing_module, "quantise", packing)
    placed(tmp_path, None, "dummy")
    whole = dict(made)
    for rank in range(2):
        made.update(values=0, packed=0)
        gathers = Part(rank=rank, ranks=2, gather=lambda mine: [torch.zeros_like(mine)] * 2)
        placed(tmp_path, gathers, "dummy")
        for kind in made:
            assert 0.3 * whole[kind] < made[kind] < 0.65 * whole[kind], (kind, rank)
