"""Every wrong value is found in one pass, with what to set; secrets stay unresolved."""

from __future__ import annotations

import json
import math
import os
import stat
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from tests.helpers.composing import composed
from zinfer.config import (
    ConfigError,
    RunConfig,
    config_from_stored,
    config_from_tree,
    config_key,
    config_to_shown,
    config_to_stored,
    config_to_tree,
)
from zinfer.job.folder import read_job, write_job

NUMBERS = [
    f"{group}.{item.name}"
    for group, kind in get_type_hints(RunConfig).items()
    if is_dataclass(kind)
    for item in fields(kind)
    if "Limits" in str(get_type_hints(kind, include_extras=True)[item.name])
    and "dict" not in str(item.type)
]


@pytest.fixture(scope="module")
def tree() -> dict[str, Any]:
    return config_to_tree(composed())


def problems_of(*overrides: str) -> list[str]:
    with pytest.raises(ConfigError) as refused:
        composed(*overrides)
    return refused.value.problems


def test_there_are_settings_that_are_numbers() -> None:
    assert len(NUMBERS) >= 30


@pytest.mark.parametrize("setting", NUMBERS)
@pytest.mark.parametrize(
    ("value", "says"),
    [
        (True, "is not a number"),
        (False, "is not a number"),
        (math.nan, "is not a finite number"),
        (math.inf, "is not a finite number"),
        (-math.inf, "is not a finite number"),
        (10**21, "is too large: at most"),
        (1e30, "is too large: at most"),
        (-1e30, "is too small"),
        (-(10**21), "is too small"),
        ("many", "number"),
        ([1], "number"),
    ],
)
def test_no_number_takes_what_is_none(
    setting: str, value: Any, says: str, tree: dict[str, Any]
) -> None:
    group, _, name = setting.partition(".")
    with pytest.raises(ConfigError) as refused:
        config_from_tree({**tree, group: {**tree[group], name: value}})
    (problem,) = refused.value.problems
    assert problem.startswith(f"{setting}=")
    assert says in problem
    assert f"Set {setting}=" in problem


@pytest.mark.parametrize(
    ("override", "instead"),
    [
        ("batch.batch_size=1000000000000", "batch.batch_size=1048576"),
        ("batch.prompt_tokens=10000000000", "batch.prompt_tokens=16777216"),
        ("launcher.ranks=5000", "launcher.ranks=1024"),
        ("batch.seed=-1", "batch.seed=0"),
        ("kv_cache.device_layers=-1", "kv_cache.device_layers=0"),
        ("plan.headroom=-1", "plan.headroom=0"),
        ("batch.batch_size=-1", "batch.batch_size=1"),
        ("launcher.master_port=70000", "launcher.master_port=65535"),
        ("batch.repeats=2.5", "batch.repeats=2"),
        ("plan.enforce=maybe", "plan.enforce=true"),
        ("+hardware.device_flops_per_s.bfloat16=nan", "device_flops_per_s.bfloat16=VALUE"),
    ],
)
def test_a_value_nobody_can_mean_is_refused_with_one_that_works(
    override: str, instead: str
) -> None:
    (problem,) = problems_of(override)
    assert f"Set {instead}" in problem or problem.endswith(instead)


def test_problems_of_all_layers_are_reported_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("NOPE", raising=False)
    found = problems_of(
        "batch.repeats=true",  # type
        "batch.warmup=-3",  # range
        "engine.name=vllm",  # choice
        "+batch.batchsize=4",  # name
        "tracking.run_name=${oc.env:NOPE}",  # interpolation
        "batch.prompt_text=${model.nope}",
        "dtype=int4",  # combination
        "zero=paper",
        "weights=pretrained",
        "launcher.node_rank=3",
    )
    beginnings = (
        "tracking.run_name=${oc.env:NOPE}: the environment has no variable NOPE",
        "batch.prompt_text=${model.nope} leads to no value",
        "batch.repeats=true is not a number",
        "batch.warmup=-3 is too small",
        "batch.batchsize is not a setting",
        "engine.name=vllm is not one of zero, resident",
        "launcher.node_rank=3 is not one of the launcher.nodes=1",
        "dtype=int4 with weights=pretrained",
    )
    assert len(found) == len(beginnings), found
    for beginning in beginnings:
        assert any(problem.startswith(beginning) for problem in found), beginning


def test_what_follows_from_a_wrong_value_is_not_reported_beside_it() -> None:
    (problem,) = problems_of("batch.batch_size=0", "launcher.ranks=2")
    assert problem.startswith("batch.batch_size=0 is too small")
    (problem,) = problems_of("offload.device=tape", "offload.use_gds=true")
    assert problem.startswith("offload.device=tape is not one of none, cpu, nvme")


@pytest.mark.parametrize("value", ["123", "3.5"])
def test_numbers_are_text_where_text_is_wanted(value: str) -> None:
    config = composed(f"tracking.run_name={value}", f"+tracking.tags.trial={value}")
    assert (config.tracking.run_name, config.tracking.tags) == (value, {"trial": value})


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (("~kv_cache",), "kv_cache.placement has no value. Set kv_cache=device"),
        (("~engine",), "engine has no value. Set engine=zero"),
        (("~tracking",), "tracking.store has no value. Set tracking=auto"),
        (("~batch",), "batch.batch_size has no value. Set batch=small"),
        (("~model",), "model.name has no value. Set model=opt-125m"),
        (("tracking=server", "tracking.uri=???"), "tracking.uri has no value"),
    ],
)
def test_a_group_that_is_null_has_choices(overrides: tuple[str, ...], says: str) -> None:
    assert any(problem.startswith(says) for problem in problems_of(*overrides))


# What comes from the environment

SECRET = ("tracking.uri=http://u:${oc.env:MY_PW}@h:1", "+tracking.tags.who=${oc.env:MY_NAME}")
INDIRECT = "+tracking.tags.store=${tracking.uri}"


@pytest.fixture
def secrets(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    values = {"MY_PW": "s3cr3t-word", "MY_NAME": "mallory-x"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    return values


def test_what_comes_from_the_environment_is_used_and_stays_unresolved_where_it_is_kept(
    secrets: dict[str, str],
) -> None:
    config = composed("tracking=server", *SECRET, INDIRECT)
    assert config.tracking.uri == "http://u:s3cr3t-word@h:1"
    assert config.tracking.tags == {"who": "mallory-x", "store": "http://u:s3cr3t-word@h:1"}
    for tree in (config_to_shown(config), config_to_stored(config)):
        assert tree["tracking"]["uri"] == "http://u:${oc.env:MY_PW}@h:1"
        assert tree["tracking"]["tags"]["who"] == "${oc.env:MY_NAME}"
        assert tree["tracking"]["tags"]["store"] == "${tracking.uri}"
        assert not [value for value in secrets.values() if value in json.dumps(tree)]
    again = config_from_stored(config_to_stored(config))
    assert again == config
    assert config_key(again) == config_key(config)
    assert config_to_stored(again) == config_to_stored(config)


def test_the_job_file_has_no_secret_and_is_its_owners_alone(
    secrets: dict[str, str], tmp_path: Path
) -> None:
    config = composed("tracking=server", *SECRET)
    before = os.umask(0)
    try:
        write_job(tmp_path, config, "0123")
    finally:
        os.umask(before)
    job = tmp_path / "job.json"
    assert stat.S_IMODE(job.stat().st_mode) == 0o600
    assert not [value for value in secrets.values() if value in job.read_text()]
    stored_job = read_job(tmp_path)
    assert stored_job is not None
    assert config_from_stored(stored_job.config) == config


def test_a_stored_configuration_is_read_where_the_variable_is_gone(
    secrets: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    stored = config_to_stored(composed("tracking=server", *SECRET))
    monkeypatch.delenv("MY_NAME")
    assert config_from_stored(stored).tracking.tags == {"who": "${oc.env:MY_NAME}"}


@pytest.mark.parametrize("text", ["a ${b} c", "\\${x}", "${oc.env:HOME}", "\\\\${", "$5", "{a}"])
def test_text_with_dollars_is_no_interpolation_when_it_is_read_back(text: str) -> None:
    config = composed().changed(batch={"prompt_text": text})
    stored: Any = json.loads(json.dumps(config_to_stored(config)))
    assert config_from_stored(stored).batch.prompt_text == text
    assert config_from_tree(config_to_tree(config)).batch.prompt_text == text


def test_a_wrong_value_from_the_environment_is_named_by_its_variable(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("ROWS", "secret-rows")
    (problem,) = problems_of("batch.batch_size=${oc.env:ROWS}")
    assert problem.startswith("batch.batch_size=${oc.env:ROWS} is not a whole number")
    monkeypatch.setenv("ROWS", "4")
    assert composed("batch.batch_size=${oc.env:ROWS}").batch.batch_size == 4
