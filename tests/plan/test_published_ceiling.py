"""The model of streaming against every published row that one link decides.

The bandwidth that it implies must be one that the disks have.
"""

from __future__ import annotations

import csv
import dataclasses
from importlib import resources

import pytest

from tests.helpers.composing import composed
from zinfer.machine.hardware import detect_hardware
from zinfer.model.spec import model_spec
from zinfer.plan.ceiling import ceiling, implied_bandwidth_bytes_per_s

ROWS = list(
    csv.DictReader(
        resources.files("multirun_analysis").joinpath("data/published_results.csv").open()
    )
)
MODELS = {
    "OPT-175B": "opt-175b",
    "BLOOM-176B": "bloom-176b",
    "Llama-3-70B": "llama-3-70b",
    "Mixtral-8x22B": "mixtral-8x22b",
}
# beginning of the row's hardware and source, conf/hardware, lowest and highest implied GB/s
BOXES = [
    ("1x H100 96GB VM", "DeepSpeedExamples deepnvme", "h100_2nvme", 12.65, 13.05),
    ("1x A6000 48GB", "DeepSpeedExamples zero_inference README (2023-09)", "a6000", 5.1, 5.2),
]


def published(hardware: str, source: str) -> list[dict[str, str]]:
    """Return the rows of ZeRO-Inference with 16-bit weights on NVMe."""
    return [
        row
        for row in ROWS
        if row["hardware"].startswith(hardware)
        and row["source"].startswith(source)
        and row["framework"].startswith("DeepSpeed ZeRO-Inference")
        and row["weights_location"] == "nvme"
        and row["weights_bits"] == "16"
    ]


@pytest.mark.parametrize(("hardware", "source", "box", "low", "high"), BOXES)
def test_every_published_nvme_row_implies_the_bandwidth_of_its_disks(
    hardware: str, source: str, box: str, low: float, high: float
) -> None:
    rows = published(hardware, source)
    assert len(rows) >= 2
    for row in rows:
        spec = model_spec(
            composed(f"model={MODELS[row['model']]}", "dtype=float16").model,
            compute_dtype="float16",
        )
        implied = (
            implied_bandwidth_bytes_per_s(
                spec.weight_bytes, float(row["value"]), int(row["batch_size"])
            )
            / 1e9
        )
        assert low - 0.05 <= implied <= high + 0.05, (row["model"], implied)


@pytest.mark.parametrize(("hardware", "source", "box", "low", "high"), BOXES)
def test_no_published_nvme_row_is_faster_than_its_ceiling_and_none_far_below(
    hardware: str, source: str, box: str, low: float, high: float
) -> None:
    for row in published(hardware, source):
        config = composed(
            f"model={MODELS[row['model']]}", "offload=nvme", "dtype=float16", f"hardware={box}",
            f"batch.batch_size={row['batch_size']}", f"batch.prompt_tokens={row['prompt_len']}",
            f"batch.new_tokens={row['gen_len']}",
        )  # fmt: skip
        bound = ceiling(
            model_spec(config.model, compute_dtype="float16"),
            config,
            detect_hardware(config.hardware, None),
        )
        assert bound.decode_step.binding == "nvme"
        assert bound.generated_tokens_per_s is not None
        # 0.4% above: 8.876 tokens/s with GDS imply 13.05 GB/s; published is "about 13 GB/s"
        assert 0.9 <= float(row["value"]) / bound.generated_tokens_per_s <= 1.005, row["model"]


def test_unknown_rates_leave_the_ceiling_unknown_not_zero() -> None:
    config = composed("model=opt-30b", "hardware=v100", "offload=nvme", "dtype=float16")
    hardware = dataclasses.replace(
        detect_hardware(config.hardware, None),
        device_memory_bytes_per_s=None,
        host_to_device_bytes_per_s=None,
        device_flops_per_s={},
    )
    bound = ceiling(model_spec(config.model, compute_dtype="float16"), config, hardware)
    assert bound.decode_step.ceiling_s is None
    assert bound.generated_tokens_per_s is None
    assert bound.decode_step.binding is None
