"""Offloading changes where weights are, never what is generated.

Tokens on the real DeepSpeed equal those of transformers alone, which reads the same checkpoint in
this process and never imports DeepSpeed's patches.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from zinfer.worker.workload import prompt_ids

NEW_TOKENS = 12
BATCH = (
    "batch.batch_size=2",
    "batch.prompt_tokens=9",
    f"batch.new_tokens={NEW_TOKENS}",
    "batch.warmup=0",
    "batch.repeats=1",
)
COMMON = ("weights=pretrained", "tracking=none", "dtype=float32", "launcher.omp_threads=1", *BATCH)
WIDE = {
    "hidden_size": 512,
    "vocab_size": 512,
    "num_hidden_layers": 2,
    "num_attention_heads": 8,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
TINY = {  # hidden 512 in float32: matrices of 1 MiB and more, which is what DeepSpeed swaps to NVMe
    "opt": {**WIDE, "ffn_dim": 1024, "word_embed_proj_dim": 512, "max_position_embeddings": 64},
    "bloom": {"hidden_size": 512, "vocab_size": 512, "n_layer": 2, "n_head": 8},
    "llama": {**WIDE, "intermediate_size": 1024, "num_key_value_heads": 2},
    "mixtral": {
        **WIDE,
        "intermediate_size": 512,
        "num_key_value_heads": 2,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
}


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Make checkpoints of tiny models, wide enough that greedy tokens vary."""
    from transformers import AutoConfig, AutoModelForCausalLM

    root = tmp_path_factory.mktemp("checkpoints")
    for family, settings in TINY.items():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(
            AutoConfig.for_model(family, **settings), dtype=torch.float32
        )
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(0.0, 0.15)
        model.save_pretrained(root / family)
    return {family: root / family for family in TINY}


def plain_tokens(
    folder: Path, prompts: torch.Tensor, dtype: torch.dtype = torch.float32
) -> list[list[int]]:
    """Return the new tokens of transformers alone, greedy, end-of-sequence ignored."""
    from transformers import AutoModelForCausalLM, GenerationConfig

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=len_of_new(prompts), pad_token_id=0
    )
    with torch.no_grad():
        output = model.generate(input_ids=prompts, attention_mask=torch.ones_like(prompts))
    tokens: list[list[int]] = output[:, prompts.shape[1] :].tolist()
    return tokens


def len_of_new(prompts: torch.Tensor) -> int:
    return NEW_TOKENS if prompts.shape[1] == 9 else 24


def results(folder: Path, *overrides: str, timeout_s: float = 500) -> list[dict[str, Any]]:
    """Run a sweep through the command line; the result of every job, in the order of the jobs."""
    command = [sys.executable, "-m", "zinfer", "-m", f"hydra.sweep.dir={folder}", *overrides]
    done = subprocess.run(
        command, cwd=folder.parent, capture_output=True, text=True, timeout=timeout_s, check=False
    )
    jobs = sorted(folder.glob("*/result.json"), key=lambda path: int(path.parent.name))
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return [json.loads(path.read_text()) for path in jobs]


@pytest.fixture(scope="session")
def swept(
    checkpoints: dict[str, Path], built_ops: list[str], tmp_path_factory: pytest.TempPathFactory
) -> dict[tuple[str, str], Any]:
    """Sweep every family x offload target."""
    folder = tmp_path_factory.mktemp("sweep") / "jobs"
    sources = ",".join(str(path) for path in checkpoints.values())
    jobs = results(
        folder, "model=custom", f"model.source={sources}", "offload=none,cpu,nvme", *COMMON
    )
    assert len(jobs) == 12
    points = [(family, offload) for family in checkpoints for offload in ("none", "cpu", "nvme")]
    return dict(zip(points, jobs, strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("offload", ["none", "cpu", "nvme"])
@pytest.mark.parametrize("family", list(TINY))
def test_tokens_under_zero_equal_the_plain_models(
    family: str, offload: str, swept: dict[tuple[str, str], Any], checkpoints: dict[str, Path]
) -> None:
    job = swept[family, offload]
    expected = plain_tokens(checkpoints[family], prompt_ids(composed(*BATCH).batch, 512, None))
    assert job["status"] == "ok"
    assert job["generated"]["token_ids"] == expected
    assert len({token for row in expected for token in row}) >= 3, (
        "a reference that only repeats itself would prove nothing"
    )


@pytest.mark.slow
@pytest.mark.parametrize("family", list(TINY))
def test_planned_weight_and_kv_bytes_are_those_of_the_tensors(
    family: str, swept: dict[tuple[str, str], Any]
) -> None:
    for offload in ("none", "cpu", "nvme"):
        job = swept[family, offload]
        model, metrics = job["model"], job["metrics"]
        assert metrics["weight_stored_bytes"] == model["weight_bytes"], offload
        held = (
            model["kv_cache_bytes"] * (9 + NEW_TOKENS - 1) // (9 + NEW_TOKENS)
        )  # the last token's is never computed
        assert metrics["kv_cache_bytes"] == held, offload
        gathered = metrics["bytes_streamed_per_step"] * NEW_TOKENS / model["weight_bytes"]
        if offload == "none":  # in the first pass
            assert gathered == pytest.approx(1)
        else:  # in each pass, a tied embedding more than once; norms in two passes only
            assert gathered > 0.9 * NEW_TOKENS, offload


@pytest.mark.slow
def test_nvme_really_reads_the_weights_from_disk(swept: dict[tuple[str, str], Any]) -> None:
    job = swept["opt", "nvme"]
    swapped = next(item["bytes"] for item in job["plan"]["tiers"]["disk"]["items"])
    assert swapped > 0
    assert (
        job["metrics"]["mlocked_bytes"]
        >= job["deepspeed"]["zero_optimization"]["offload_param"]["buffer_size"] * 4 * 2
    )
    if job["metrics"]["nvme_read_bytes"] is not None:
        assert job["metrics"]["nvme_read_bytes"] >= swapped * (NEW_TOKENS - 1) * 0.5, (
            "less than half of the passes came from the disk"
        )


@pytest.mark.slow
def test_two_ranks_generate_the_tokens_of_one(
    checkpoints: dict[str, Path], built_ops: list[str], tmp_path: Path
) -> None:
    sources = ",".join(str(checkpoints[family]) for family in ("llama", "mixtral"))
    jobs = results(
        tmp_path / "jobs",
        "model=custom",
        f"model.source={sources}",
        "offload=cpu,nvme",
        "launcher.ranks=2",
        *COMMON,
    )
    prompts = prompt_ids(composed(*BATCH).batch, 512, None)
    for job, family in zip(jobs, ("llama", "llama", "mixtral", "mixtral"), strict=True):
        assert job["generated"]["token_ids"] == plain_tokens(checkpoints[family], prompts), family


@pytest.mark.slow
def test_a_real_model_says_the_same_under_every_offload(
    demo_model: Path, built_ops: list[str], tmp_path: Path
) -> None:
    text = "The capital of France is Paris. The capital of Italy is Rome. The capital of Germany is"
    batch = (
        "batch.prompt=text",
        f"batch.prompt_text='{text}'",
        "batch.prompt_tokens=18",
        "batch.new_tokens=24",
    )
    jobs = results(
        tmp_path / "jobs", "model=smollm2-135m", "offload=none,cpu,nvme", *COMMON, *batch
    )
    from transformers import AutoTokenizer

    prompts = prompt_ids(
        composed(*batch, "batch.batch_size=2").batch,
        49152,
        AutoTokenizer.from_pretrained(demo_model),
    )
    expected = plain_tokens(demo_model, prompts)
    for job in jobs:
        assert job["generated"]["token_ids"] == expected
        assert "Berlin" in job["generated"]["text"][0]
