"""Every preset composes, names rows that exist, has a small sibling, and fits at full size on the
box where its numbers were published.
"""

from __future__ import annotations

import itertools
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml

from multirun_analysis.published.rows import SPEED_METRICS, Published, read_published
from tests.helpers.composing import CONF, composed
from zinfer.config import RunConfig
from zinfer.machine.hardware import detect_hardware
from zinfer.model.spec import ModelSpec, model_spec
from zinfer.plan.fit import shortfall
from zinfer.plan.planned import plan_run

FOLDER = CONF / "experiment"
PRESETS = sorted(
    path.stem for path in FOLDER.glob("*.yaml") if "published.source" in path.read_text()
)
TINY = sorted(path.stem for path in (FOLDER / "tiny").glob("*.yaml"))


def tree(name: str) -> dict[str, Any]:
    content = yaml.safe_load((FOLDER / f"{name}.yaml").read_text())
    assert isinstance(content, dict)
    return content


def swept(name: str) -> dict[str, list[str]]:
    """Map each setting to its values."""
    params = tree(name)["hydra"]["sweeper"]["params"]
    return {key: str(values).lower().split(",") for key, values in params.items()}


def published_rows(name: str) -> list[Published]:
    """Return the published speeds of ZeRO-Inference that a preset names."""
    tags = tree(name)["tracking"]["tags"]
    return [
        row
        for row in read_published()
        if row.source == tags["published.source"]
        and tags.get("published.table") in (None, row.table)
        and row.metric in SPEED_METRICS
        and "ZeRO-Inference" in row.framework
        and "SGLang" not in row.framework
    ]


@cache
def spec_of(model: str, dtype: str | None) -> ModelSpec:
    return model_spec(composed(f"model={model}").model, compute_dtype=dtype)


def planned(config: RunConfig) -> tuple[bool, str]:
    """Tell if it fits on the hardware that it names, and what is said if it does not."""
    spec = spec_of(
        config.model.name, None if config.dtype.compute == "auto" else config.dtype.compute
    )
    hardware = detect_hardware(config.hardware, None)
    run = plan_run(config, hardware, spec)
    return run.fits, "" if run.fits else shortfall(run, with_advice=False)


def test_each_preset_has_a_small_sibling_and_no_sibling_is_alone() -> None:
    assert len(PRESETS) == 10
    assert TINY == PRESETS


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_says_its_source_and_its_commands(name: str) -> None:
    text = (FOLDER / f"{name}.yaml").read_text()
    hardware = tree(name)["tracking"]["tags"]["published.hardware"]
    assert "Source: " in text
    assert f"zinfer -m experiment={name}" in text
    assert f"zinfer -m experiment={name} task=plan hardware={hardware}" in text
    assert f"zinfer -m experiment=tiny/{name}" in text
    assert (CONF / "hardware" / f"{hardware}.yaml").is_file()


@pytest.mark.parametrize("name", [*PRESETS, *(f"tiny/{name}" for name in TINY)])
def test_every_value_that_a_preset_sweeps_is_a_valid_configuration(name: str) -> None:
    values = swept(name)
    widest = max(map(len, values.values()))
    for position in range(
        widest
    ):  # each value at least once; products of groups are the plan's business
        chosen = [f"{key}={options[position % len(options)]}" for key, options in values.items()]
        device = (
            []
            if any(key.startswith("offload=") for key in chosen)
            else ["offload.nvme_path=/local_nvme"]
        )
        assert composed(f"experiment={name}", *chosen, *device).tracking.tags["published.source"]


def comparable_rows(name: str) -> list[Published]:
    """Return rows that zinfer has a configuration for, on one GPU, as far as they are a target."""
    rows = [
        row
        for row in published_rows(name)
        if row.devices == 1 and row.standing in ("as published", "approximate")
    ]
    return [row for row in rows if row.why_not_comparable is None and row.value is not None]


@pytest.mark.parametrize("name", PRESETS)
def test_the_speeds_that_a_preset_reproduces_stand_in_its_head(name: str) -> None:
    lines = (FOLDER / f"{name}.yaml").read_text().splitlines()
    words = " ".join(line for line in lines if line.startswith("#")).split()
    named = {number for word in words if (number := number_of(word.strip("(),;:"))) is not None}
    device = tree(name)["tracking"]["tags"]["published.hardware"].partition("_")[0].upper()
    rows = [row for row in comparable_rows(name) if sweeps(name, row) and device in row.hardware]
    wanted = {row.value for row in rows}
    assert wanted and wanted <= named


def number_of(word: str) -> float | None:
    """Read a word as a number. None for other words."""
    try:
        return float(word)
    except ValueError:
        return None


@cache
def settings_of(name: str) -> RunConfig:
    """Return what a preset fixes."""
    return composed(f"experiment={name}", "offload.nvme_path=/x")


def sweeps(name: str, row: Published) -> bool:
    """Tell if a job of the preset is this row."""
    fixed, values = settings_of(name), swept(name)
    if (row.kv_placement, row.weights_bits) != (fixed.kv_cache.placement, fixed.dtype.bits or 16):
        return False
    return all(
        str(wanted) in values.get(setting, [str(default)])
        for setting, wanted, default in (
            ("model", row.model, fixed.model.name),
            ("offload", row.offload, fixed.offload.device),
            ("batch.batch_size", row.batch_size, fixed.batch.batch_size),
            ("batch.prompt_tokens", row.prompt_tokens, fixed.batch.prompt_tokens),
            ("batch.new_tokens", row.new_tokens, fixed.batch.new_tokens),
        )
    )


def full_size_rows() -> list[tuple[str, Published]]:
    return [(name, row) for name in PRESETS for row in comparable_rows(name) if sweeps(name, row)]


@pytest.mark.parametrize(
    ("name", "row"),
    full_size_rows(),
    ids=lambda value: value if isinstance(value, str) else f"{value.model}-b{value.batch_size}",
)
def test_a_plan_of_every_published_row_fits_where_it_was_published(
    name: str, row: Published
) -> None:
    hardware = tree(name)["tracking"]["tags"]["published.hardware"]
    settings = [
        f"experiment={name}",
        f"hardware={hardware}",
        f"model={row.model}",
        f"batch.batch_size={row.batch_size}",
        "task=plan",
    ]
    settings += [
        f"batch.prompt_tokens={row.prompt_tokens}",
        f"batch.new_tokens={row.new_tokens}",
        f"offload={row.offload}",
    ]
    if row.offload == "nvme":
        settings.append("offload.nvme_path=/local_nvme")
    config = composed(*settings)
    assert {4: "int4", 16: None}[row.weights_bits or 16] == (
        config.dtype.weights if config.dtype.bits else None
    )
    fits, why = planned(config)
    assert fits, why


def test_every_published_row_is_swept_by_a_preset_that_names_its_table() -> None:
    swept_rows = [row for _, row in full_size_rows()]
    for name in PRESETS:
        for row in comparable_rows(name):
            assert row in swept_rows, (name, row)


def test_no_product_of_a_small_sibling_is_larger_than_minutes() -> None:
    for name in TINY:
        assert len(list(itertools.product(*swept(f"tiny/{name}").values()))) <= 16


def test_docs_name_every_preset() -> None:
    text = (Path(__file__).parents[2] / "docs" / "reproducing.md").read_text()
    for name in PRESETS:
        assert f"experiment={name}" in text
        assert f"experiment=tiny/{name}" in text
