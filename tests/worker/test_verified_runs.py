"""Whole runs on the real DeepSpeed: what is not the model's checkpoint is never timed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.checkpoints import FAULTY, NOT_NUMBERS, WHOLE
from tests.helpers.running import results

BATCH = (
    "batch.batch_size=2",
    "batch.prompt_tokens=8",
    "batch.new_tokens=4",
    "batch.warmup=0",
    "batch.repeats=1",
)
COMMON = ("weights=pretrained", "tracking=none", "dtype=float32", "launcher.omp_threads=1", *BATCH)
ENDS = {
    "base": "ok",
    "ddp_prefix": "ok",
    "newer_llava": "ok",
    "experts": "ok",
    "buffers": "ok",
    "one_layer_missing": "refused",
    "all_wrong_names": "refused",
    "gptq_without_config": "refused",
    "nan": "error",
    "infinity_in_a_buffer": "error",
}
OFFLOADS = ("none", "cpu", "nvme")
WAYS = ("engine=resident", *(f"engine=zero offload={offload}" for offload in OFFLOADS))
WRITERS = {**WHOLE, **{name: row[0] for name, row in {**FAULTY, **NOT_NUMBERS}.items()}}


@pytest.fixture(scope="module")
def ended(
    built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, int], dict[str, Any]]:
    """Run every checkpoint in every way."""
    root = tmp_path_factory.mktemp("verified")
    sources = ",".join(str(WRITERS[name](root / name)) for name in ENDS)
    common = ("model=custom", f"model.source={sources}", *COMMON)
    found = results(root / "resident", "engine=resident", "offload=none", *common)
    jobs = {(name, 0): job for name, job in zip(ENDS, found, strict=True)}
    found = results(root / "zero", "engine=zero", *common, f"offload={','.join(OFFLOADS)}")
    points = [(name, way) for name in ENDS for way in range(1, len(WAYS))]
    jobs |= zip(points, found, strict=True)
    return jobs


@pytest.mark.slow
@pytest.mark.parametrize("way", range(len(WAYS)), ids=WAYS)
@pytest.mark.parametrize("name", ENDS)
def test_no_run_is_ok_with_weights_that_are_not_the_checkpoints(
    name: str, way: int, ended: dict[tuple[str, int], dict[str, Any]]
) -> None:
    job = ended[name, way]
    assert job["status"] == ENDS[name]
    if job["status"] == "ok":
        assert job["metrics"]["weights_verified_bytes"] == job["weights"]["bytes"]
        assert job["weights"]["bytes"] >= job["model"]["weight_bytes"]
        assert len(job["weights"]["sha256"]) == 64
        return
    said = "\n".join(job.get("problems") or [job["reason"]])
    assert "model." in said and "tensors" in said
    events = [json.loads(line) for line in (Path(job["job_dir"]) / "events.jsonl").open()]
    assert not [event for event in events if event["event"] == "sample"]
    phases = [event["name"] for event in events if event["event"] == "phase"]
    assert phases[-1] == ("verify" if job["status"] == "error" else "load")


@pytest.mark.slow
@pytest.mark.parametrize("way", range(len(WAYS)))
def test_a_prefix_changes_nothing_and_is_said(
    way: int, ended: dict[tuple[str, int], dict[str, Any]]
) -> None:
    plain, renamed = ended["base", way], ended["ddp_prefix", way]
    assert renamed["generated"]["token_ids"] == plain["generated"]["token_ids"]
    assert plain["generated"] == ended["base", 0]["generated"]
    assert any("module.*: the prefix was taken off" in said for said in renamed["warnings"])
    assert ended["newer_llava", way]["generated"]["token_ids"] == plain["generated"]["token_ids"]
    assert any("only its text part" in said for said in ended["newer_llava", way]["warnings"])


@pytest.mark.slow
def test_two_ranks_verify_together_and_end_together(built_ops: list[str], tmp_path: Path) -> None:
    names = ("base", "experts", "nan", "one_layer_missing")
    sources = ",".join(str(WRITERS[name](tmp_path / name)) for name in names)
    jobs = results(
        tmp_path / "jobs",
        "model=custom",
        f"model.source={sources}",
        "offload=cpu",
        "launcher.ranks=2",
        "launcher.timeout_s=200",
        *COMMON,
    )
    assert [job["status"] for job in jobs] == ["ok", "ok", "error", "refused"]
    assert "model.norm.weight" in jobs[2]["reason"]


LOSING = '''
import torch
from deepspeed.runtime.zero.partition_parameters import GatheredParameters

leave = GatheredParameters.__exit__
lost = []

def leave_without_writing(self, *rest):
    """Forget the values of the fourth gathered parameter of a load, as zero.Init did."""
    if self.enabled and self.src_rank is not None:
        lost.append(None)
        if len(lost) == 4:
            for parameter in self.params:
                parameter.data.normal_()
    return leave(self, *rest)

GatheredParameters.__exit__ = leave_without_writing
'''


@pytest.mark.slow
def test_weights_that_zero_init_loses_silently_end_the_run(
    built_ops: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As in transformers issues 43257 and 45313: read, reported as loaded, and left random."""
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}:{Path(__file__).parents[2]}")
    (tmp_path / "losing.py").write_text(LOSING)
    (tmp_path / "sitecustomize.py").write_text(SITE)
    folder = WRITERS["base"](tmp_path / "base")
    (job,) = results(
        tmp_path / "jobs", "model=custom", f"model.source={folder}", "offload=cpu", *COMMON
    )
    assert job["status"] == "error"
    assert "2 tensors do not hold the checkpoint's values (model." in job["reason"]


SITE = '''
import importlib.abc, importlib.util, sys

class Finder(importlib.abc.MetaPathFinder):
    """Breaks DeepSpeed's gathering once the engine is imported."""

    def find_spec(self, name, path, target=None):
        if name != "zinfer.worker.engines.zero":
            return None
        sys.meta_path.remove(self)
        import losing
        return importlib.util.find_spec(name)

sys.meta_path.insert(0, Finder())
'''
