"""Metrics against arithmetic by hand, and prompts of exact lengths."""

from __future__ import annotations

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from tests.helpers.composing import composed
from zinfer.config import BatchConfig, ConfigError
from zinfer.worker.failure import failure
from zinfer.worker.metrics import Measured, Metrics, summarise
from zinfer.worker.process_use import MemoryUse
from zinfer.worker.ranks import RankResult, metrics_by_rank
from zinfer.worker.samples import Sample
from zinfer.worker.workload import prompt_ids

BATCH = BatchConfig(batch_size=4, prompt_tokens=10, new_tokens=3, warmup=1, repeats=3)
SAMPLES = [
    Sample(kind="warmup", index=0, prefill_s=9.0, decode_step_s=(9.0, 9.0), total_s=27.0),
    Sample(kind="timed", index=0, prefill_s=1.0, decode_step_s=(0.5, 0.5), total_s=2.0),
    Sample(kind="timed", index=1, prefill_s=2.0, decode_step_s=(0.25, 0.75), total_s=3.0),
    Sample(kind="timed", index=2, prefill_s=1.5, decode_step_s=(0.5, 2.0), total_s=4.0),
]
USE = MemoryUse(
    peak_host_rss_bytes=100,
    mlocked_bytes=10,
    huge_page_bytes=None,
    nvme_read_bytes=7,
    nvme_written_bytes=1000,
    peak_device_allocated_bytes=None,
    peak_device_reserved_bytes=None,
)


RANK = RankResult(memory=USE, weight_stored_bytes=5, kv_cache_bytes=None, token_ids=())


def summary(samples: list[Sample], batch: BatchConfig = BATCH) -> Metrics:
    measured = Measured(
        samples=tuple(samples),
        yardstick_s=(0.01, 0.01, 0.04),
        load_s=1.0,
        import_s=2.0,
        ranks=(RANK, RANK),
    )
    return summarise(measured, batch)


def test_metrics_are_medians_of_timed_generations_only() -> None:
    metrics = summary(SAMPLES)
    assert metrics.prefill_s == metrics.time_to_first_token_s == 1.5
    assert metrics.total_s == 3.0
    assert (metrics.total_s_min, metrics.total_s_max, metrics.total_s_stddev) == (2.0, 4.0, 1.0)
    assert metrics.decode_step_s == 0.5
    assert metrics.generated_tokens_per_s == 4 * 3 / 3.0
    assert metrics.decode_tokens_per_s == 4 * 2 / 1.0
    assert metrics.time_per_output_token_s == 1.0 / 2
    assert metrics.prefill_tokens_per_s == pytest.approx(4 * 10 / 1.5)
    assert metrics.first_generate_s == 27.0
    assert metrics.yardstick_s == pytest.approx(0.02)
    assert metrics.timed_runs == 3


def test_memory_is_summed_over_ranks_and_the_unknown_stays_unknown() -> None:
    metrics = summary(SAMPLES)
    assert (metrics.peak_host_rss_bytes, metrics.mlocked_bytes, metrics.nvme_read_bytes) == (
        200,
        20,
        14,
    )
    assert metrics.nvme_written_bytes == 2000
    tokens = 4 * 4 * 3  # generations, the warm-up too, times rows times new tokens
    assert metrics.nvme_read_bytes_per_token == pytest.approx(14 / tokens)
    assert metrics.nvme_written_bytes_per_token == pytest.approx(2000 / tokens)
    assert metrics.weight_stored_bytes == 10
    assert metrics_by_rank((RANK,)) == {}
    assert metrics_by_rank((RANK, RANK)) == {
        "rank0_peak_host_rss_bytes": 100,
        "rank1_peak_host_rss_bytes": 100,
    }
    assert metrics.peak_device_allocated_bytes is None
    assert "peak_device_allocated_bytes" not in metrics.known()
    assert "kv_cache_bytes" not in metrics.known()


def test_a_percentile_needs_enough_samples() -> None:
    metrics = summary(SAMPLES)
    assert metrics.decode_step_s_p90 is None
    many = [
        Sample(
            kind="timed",
            index=0,
            prefill_s=1.0,
            decode_step_s=tuple(step / 100 for step in range(101)),
            total_s=60.0,
        )
    ]
    full = summary(many)
    assert full.decode_step_s_p90 == pytest.approx(0.90)
    assert full.decode_step_s_p99 == pytest.approx(0.99)
    assert full.total_s_stddev is None, "one value has no spread"
    assert all(math.isfinite(value) for value in full.known().values())


def test_synthetic_prompts_are_seeded_ordinary_ids_of_exact_length() -> None:
    batch = composed("batch.batch_size=3", "batch.prompt_tokens=17").batch
    ids = prompt_ids(batch, 512, None)
    assert ids.shape == (3, 17)
    assert torch.equal(ids, prompt_ids(batch, 512, None))
    assert not torch.equal(ids[0], ids[1])
    assert 4 <= int(ids.min()) <= int(ids.max()) < 512
    assert not torch.equal(
        ids,
        prompt_ids(
            composed("batch.batch_size=3", "batch.prompt_tokens=17", "batch.seed=1").batch,
            512,
            None,
        ),
    )


@pytest.fixture(scope="session")
def tokenizer(demo_model: Path) -> object:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(demo_model)


@pytest.mark.parametrize("count", [1, 5, 64, 513])
def test_text_prompts_have_exactly_as_many_tokens_as_asked(tokenizer: object, count: int) -> None:
    batch = composed(
        "batch.prompt=text", f"batch.prompt_tokens={count}", "batch.batch_size=2"
    ).batch
    ids = prompt_ids(batch, 49152, tokenizer)
    assert ids.shape == (2, count)
    decoded = tokenizer.decode(ids[0])  # type: ignore[attr-defined]
    assert decoded.endswith("capital city of"[-len(decoded) :])


def test_a_file_prompts_each_row_with_its_own_text_and_too_little_text_is_refused(
    tokenizer: object,
) -> None:
    path = Path(__file__).parents[2] / "examples" / "prompts.txt"
    batch = composed(
        "batch.prompt=file",
        f"batch.prompt_file={path}",
        "batch.batch_size=4",
        "batch.prompt_tokens=64",
    ).batch
    ids = prompt_ids(batch, 49152, tokenizer)
    assert ids.shape == (4, 64)
    assert len({tuple(row.tolist()) for row in ids}) == 4
    with pytest.raises(ConfigError, match=r"rows of 512 need 2048.*batch\.batch_size="):
        prompt_ids(
            composed(
                "batch.prompt=file",
                f"batch.prompt_file={path}",
                "batch.batch_size=4",
                "batch.prompt_tokens=512",
            ).batch,
            49152,
            tokenizer,
        )


def test_text_without_a_tokenizer_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"batch\.prompt=synthetic"):
        prompt_ids(composed("batch.prompt=text").batch, 512, None)


REFUSAL = """
import sys
from zinfer.config import ConfigError
from zinfer.worker.failure import failure
print(failure(ConfigError(["no"])), failure(ValueError("odd\\nmore")), "torch" in sys.modules)
"""


def test_a_refusal_is_told_without_importing_torch() -> None:
    said = subprocess.run(
        [sys.executable, "-c", REFUSAL], capture_output=True, text=True, check=True
    )
    assert said.stdout.strip() == "('refused', 'no') ('error', 'ValueError: odd') False"


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "oom_host"),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"), "oom_host"),
        (RuntimeError("std::bad_alloc"), "oom_host"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"), "oom_device"),
        (RuntimeError("unlucky"), "error"),
        (KeyboardInterrupt(), "error"),
    ],
)
def test_each_kind_of_failure_has_its_status(error: BaseException, status: str) -> None:
    assert failure(error)[0] == status
