"""The collection of published results, and what its rows imply about the hardware they ran on."""

from __future__ import annotations

import pytest

from multirun_analysis.compare import configurations
from multirun_analysis.published.beside import compare_published
from multirun_analysis.published.boxes import (
    ceiling_bytes_per_s,
    explanation,
    published_nvme_bytes_per_s,
    rounding,
)
from multirun_analysis.published.rows import (
    PUBLISHED_PARAMETERS,
    Published,
    read_published,
    streamed_shares,
)
from multirun_analysis.tables.published import published_table
from tests.helpers.invented_runs import run


def rows(source: str, **equal: object) -> list[Published]:
    return [
        row
        for row in read_published()
        if row.source == source
        and all(getattr(row, name) == value for name, value in equal.items())
    ]


def test_every_row_is_kept_with_its_source() -> None:
    assert len(read_published()) == 409
    assert all(row.source and row.where for row in read_published())


def test_rows_that_are_no_target_are_marked() -> None:
    standings = {
        standing: sum(row.standing == standing for row in read_published())
        for standing in ("approximate", "draft", "inconsistent")
    }
    assert standings == {"approximate": 58, "draft": 26, "inconsistent": 16}


DEEPNVME = "DeepSpeedExamples deepnvme/zero_inference README"
README = "DeepSpeedExamples zero_inference README (2023-09)"


def test_the_h100_rows_imply_the_bandwidth_of_their_disks() -> None:
    implied = [row.implied_bytes_per_s for row in rows(DEEPNVME)]
    assert len(implied) == 6
    assert all(
        value is not None and 12.6e9 < value < 13.1e9 for value in implied
    )  # on an array of 13 GB/s


def test_the_a6000_nvme_rows_imply_nine_tenths_of_their_disk() -> None:
    found = rows(README, weights_location="nvme", framework="DeepSpeed ZeRO-Inference >=0.10.3")
    shares = [(row.implied_bytes_per_s or 0) / (ceiling_bytes_per_s(row) or 1) for row in found]
    assert len(shares) == 2
    assert all(0.90 < share < 0.94 for share in shares)


def test_quantised_weights_count_their_scales() -> None:
    (row,) = rows(README, model="opt-30b", weights_bits=4, batch_size=24)
    assert row.weight_bytes == int(29_974_540_288 * (0.5 + 4 / 64))
    assert row.implied_bytes_per_s == pytest.approx(row.weight_bytes * 22.74 / 24)


def test_several_gpus_share_one_pass_over_the_weights() -> None:
    (row,) = rows(
        "DeepSpeed ZeRO-Inference blog 2022-09-10",
        table="Table 4",
        model="opt-30b",
        weights_location="nvme",
        devices=4,
    )
    assert row.rate_metric == "decode_tokens_per_s"
    assert row.implied_bytes_per_s == pytest.approx(2 * 29_974_540_288 * 72 / 256)


@pytest.mark.parametrize(
    ("location", "shares"),
    [
        ("cpu", {"cpu": 1.0}),
        ("gpu", {}),
        ("cpu 50% nvme 50%", {"cpu": 0.5, "nvme": 0.5}),
        ("gpu 12B + nvme 18B", {"nvme": 0.6}),
        ("gpu 20% cpu 80%", {"cpu": 0.8}),
        ("cpu or nvme", None),
        ("gpu (sharded)", None),
        ("", None),
    ],
)
def test_a_placement_says_what_is_streamed(location: str, shares: dict[str, float] | None) -> None:
    assert streamed_shares(location) == shares


@pytest.mark.parametrize(
    ("hardware", "bytes_per_s"),
    [
        ("1x A6000 48GB; 252GB DRAM; CS3040 NVMe 5.6GB/s seq read", 5.6e9),
        ("1x A100 80GB (Azure NC96ads_A100_v4); 4 NVMe Gen4 (3.25GB/s each)", 13e9),
        ("1x H100 96GB VM; 2x NVMe RAID0 ~13GB/s read", 13e9),
        ("1x T4 16GB (GCP); 208GB DRAM; 1.5TB NVMe ~2GB/s read 1GB/s write", 2e9),
        ("1x T4 16GB (GCP); SSD 0.5GB/s read", 0.5e9),
        ("1x H200 141GB (ND-H200-v5); 8x Gen5 NVMe", 48e9),
        ("1x V100 32GB (DGX-2, 1.5TB DRAM, 30TB NVMe)", None),
    ],
)
def test_a_published_disk_speed_is_read_from_the_description(
    hardware: str, bytes_per_s: float | None
) -> None:
    assert published_nvme_bytes_per_s(hardware) == bytes_per_s


def test_a_number_faster_than_its_disk_is_explained_and_a_rounded_one_is_not_accused() -> None:
    drafts = [
        row
        for row in read_published()
        if row.standing == "draft" and row.offload == "nvme" and "ZeRO" in row.framework
    ]
    assert [
        explanation(row) for row in drafts if row.model == "opt-175b" and "A6000" in row.hardware
    ] == ["faster than its disk: page cache, or weights kept on the device"]
    (row,) = rows(
        "FlexGen (arXiv 2303.06865)",
        model="opt-175b",
        framework="DeepSpeed ZeRO-Inference",
        prompt_tokens=512,
        batch_size=1,
        devices=1,
    )
    assert rounding(row) == pytest.approx(0.5)
    assert explanation(row) == "at its disk's limit, within the rounding of what was published"
    assert not [
        row for row in rows(DEEPNVME) if "faster" in (explanation(row) or "")
    ]  # 13.05 of "~13" GB/s


def test_parameter_counts_are_those_of_the_catalogue() -> None:
    """Published and measured weights are the same bytes: both are counted from conf/model."""
    from hydra import compose, initialize_config_dir

    from zinfer.config import parse_config
    from zinfer.model.spec import model_spec
    from zinfer.paths import conf_dir

    with initialize_config_dir(conf_dir(), version_base="1.3"):
        for model, parameters in PUBLISHED_PARAMETERS.items():
            config = parse_config(compose("config", overrides=[f"model={model}"]))
            assert model_spec(config.model).num_parameters == parameters, model


# Beside measured runs


def test_the_same_configuration_stands_beside_its_published_row() -> None:
    measured = run(9.0, dtype_weights="int4", batch_batch_size="24", kv_cache_placement="device")
    comparisons = [
        item
        for item in compare_published(configurations([measured]))
        if item.published.source == README
    ]
    same = [item for item in comparisons if item.measured is not None and not item.differs]
    assert [item.published.text for item in same] == ["22.74"]
    assert same[0].measured_bytes_per_s == pytest.approx(6e10 * 9.0 / 24)
    near = [item for item in comparisons if item.measured is not None and item.differs]
    assert [item.differs for item in near] == ["batch 24 here"]  # FlexGen's row at batch 48


def test_rows_without_a_measured_equal_say_why() -> None:
    measured = run(9.0, dtype_weights="int4", kv_cache_placement="device")
    missing = {
        item.missing
        for item in compare_published(configurations([measured]))
        if item.measured is None
    }
    assert not any("kv_cache" in reason for reason in missing)
    assert "not run here" in missing
    tried = run(
        status="oom_host",
        dtype_weights="bfloat16",
        offload_device="nvme",
        kv_cache_placement="device",
    )
    assert "tried here: oom_host" in {
        item.missing for item in compare_published(configurations([tried]))
    }


def test_a_preset_brings_its_published_table_even_for_other_models() -> None:
    tags = {"published.source": DEEPNVME, "published.table": "Initial Results table"}
    comparisons = compare_published(configurations([run(9.0, model_name="tiny-llama", tags=tags)]))
    assert len(comparisons) == 6
    assert compare_published(configurations([run(9.0, model_name="tiny-llama")])) == ()


def test_the_table_normalises_both_sides() -> None:
    table = published_table(
        compare_published(configurations([run(9.0, dtype_weights="int4", batch_batch_size="24")]))
    )
    keys = [column.key for column in table.columns]
    row = next(row for row in table.rows if row[keys.index("published")].text == "22.74")
    assert row[keys.index("published_bytes_per_s")].text == "16.0"
    assert row[keys.index("standing")].text == "as published"
    assert str(row[keys.index("where")].value).startswith("deepspeedai/DeepSpeedExamples")
