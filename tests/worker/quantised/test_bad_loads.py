"""Whole runs of checkpoints that cannot be packed leave nothing on the disk."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.packed_models import first_layers
from tests.helpers.running import results
from zinfer.paths import cache_dir

DTYPES = ("int8", "int4", "int4_searched")
LAST = "model.layers.0.self_attn.v_proj.weight"
"""Read when larger weights are on the disk already."""


def with_last(value: float) -> Callable[[Path], None]:
    """Write this number at the end of the weight that is read last."""

    def change(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = folder / "model-00002-of-00002.safetensors"
        tensors = {name: each.float() for name, each in load_file(path).items()}
        tensors[LAST][-1, -1] = value
        save_file(tensors, path, metadata={"format": "pt"})

    return change


def cut(folder: Path) -> None:
    path = folder / "model-00002-of-00002.safetensors"
    path.write_bytes(path.read_bytes()[:-10_000])


FAULTS: dict[str, tuple[Callable[[Path], None], str, str]] = {
    "cut": (cut, "refused", "model-00002-of-00002.safetensors is cut short"),
    "nan": (with_last(float("nan")), "error", f"tensor {LAST} holds NaN or infinity"),
    "beyond": (with_last(1e9), "error", f"tensor {LAST} cannot be held in"),
    "whole": (lambda folder: None, "ok", ""),
}
"""Name -> what is done to a checkpoint of two shards, how its run ends, and what is said."""


def in_shards(folder: Path) -> None:
    """Split a checkpoint into two files; the weight that is read last is in the second."""
    from safetensors.torch import load_file, save_file

    whole = folder / "model.safetensors"
    shards: dict[str, dict[str, torch.Tensor]] = {}
    for name, tensor in load_file(whole).items():
        number = 2 if "self_attn" in name else 1
        shards.setdefault(f"model-0000{number}-of-00002.safetensors", {})[name] = tensor
    whole.unlink()
    places = {name: file for file, held in shards.items() for name in held}
    for file, held in shards.items():
        save_file(held, folder / file, metadata={"format": "pt"})
    index = {"metadata": {}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


@pytest.fixture(scope="module")
def left(
    demo_model: Path, built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, dict[tuple[str, str, int], dict[str, Any]]]:
    """Run every faulty checkpoint with every dtype on one and two ranks, from the disk."""
    root = tmp_path_factory.mktemp("bad")
    cache = root / "cache"
    cache.mkdir()
    for folder in ("torch_extensions", "kernels"):  # else they would be compiled again
        (cache / folder).symlink_to(cache_dir() / folder)
    for name, (change, *_) in FAULTS.items():
        change_all(first_layers(demo_model, root / name, 1), change)
    sources = ",".join(str(root / name) for name in FAULTS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZINFER_CACHE", str(cache))
        jobs = results(
            root / "jobs", "model=custom", f"model.source={sources}", f"dtype={','.join(DTYPES)}",
            "launcher.ranks=1,2", "weights=pretrained", "offload=nvme",
            f"offload.nvme_path={root / 'swap'}", "batch.batch_size=2", "batch.prompt_tokens=8",
            "batch.new_tokens=4", "batch.warmup=0", "batch.repeats=1", "tracking=none",
            "launcher.omp_threads=1", "quality.enabled=false", "dtype.compute=float32",
            timeout_s=1500,
        )  # fmt: skip
    keys = [(name, dtype, ranks) for name in FAULTS for dtype in DTYPES for ranks in (1, 2)]
    return root, dict(zip(keys, jobs, strict=True))


def change_all(folder: Path, change: Callable[[Path], None]) -> None:
    in_shards(folder)
    change(folder)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", FAULTS)
def test_a_bad_checkpoint_ends_with_file_or_tensor_named(
    name: str, dtype: str, ranks: int, left: tuple[Path, dict[tuple[str, str, int], dict[str, Any]]]
) -> None:
    _, status, said = FAULTS[name]
    job = left[1][name, dtype, ranks]
    assert job["status"] == status, job["reason"]
    assert said in "\n".join(job["problems"] or [job["reason"] or ""])


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_nothing_is_left_in_the_swap_folder_and_nothing_half_made_in_the_cache(
    left: tuple[Path, dict[tuple[str, str, int], dict[str, Any]]],
) -> None:
    root, jobs = left
    assert jobs["whole", "int4_searched", 2]["metrics"]["weight_stored_bytes"] > 0
    assert [path for path in (root / "swap").rglob("*") if not path.is_dir()] == []
    kept = [path for path in (root / "cache" / "quantised").iterdir() if path.suffix != ".lock"]
    assert len(kept) == 1, "the whole checkpoint's searched weights, and no others"
    assert {path.name for path in kept[0].iterdir()} == {"made.json", "packed.safetensors"}
    assert not kept[0].name.startswith("."), "it is no unfinished one"
    assert list((root / "cache" / "running").glob("*")) == []
