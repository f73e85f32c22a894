"""Tasks and engines are described once: configuration, driver and worker ask the tables."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest

from tests.helpers.composing import composed
from zinfer.config.engines import ENGINES, engine_kind, engine_names, engine_of
from zinfer.config.tasks import TASKS, function_named, task_of
from zinfer.machine import native_ops

PACKAGE = Path(__file__).parents[2] / "zinfer"


@pytest.mark.parametrize("task", TASKS.values(), ids=list(TASKS))
def test_the_functions_of_every_task_exist(task) -> None:  # type: ignore[no-untyped-def]
    assert callable(function_named(task.command))
    if task.worker is not None:
        assert callable(function_named(task.worker))
    assert task.worker or not (task.loads_model or task.uses_swap or task.loads_ops)


@pytest.mark.parametrize("engine", ENGINES.values(), ids=list(ENGINES))
def test_the_module_of_every_engine_is_there_and_the_table_does_not_import_it(engine) -> None:  # type: ignore[no-untyped-def]
    assert find_spec(engine.load.partition(":")[0]) is not None
    assert engine.places[0] == "none"


def test_no_module_asks_for_a_task_or_an_engine_by_its_name() -> None:
    """The tables replace such conditions; a new engine must not have to find them."""
    asks = re.compile(r"""(config\.task|engine\.name|\.engine)\s*(==|!=|in)\s*[("']""")
    found = [
        f"{path.relative_to(PACKAGE)}:{number}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        for number, line in enumerate(path.read_text().splitlines(), start=1)
        if asks.search(line)
    ]
    assert not found


@pytest.mark.parametrize(
    ("overrides", "ops"),
    [
        (("offload=nvme",), ["pin_memory", "async_io"]),
        (
            ("offload=nvme", "engine=zero", "offload.use_gds=true"),
            ["pin_memory", "async_io", "gds"],
        ),
        (("engine=resident",), []),
        (("offload=cpu",), []),
    ],
)
def test_the_ops_of_a_run_follow_its_engine_and_offload(
    overrides: tuple[str, ...], ops: list[str]
) -> None:
    needed = native_ops.ops_of(composed(*overrides))
    assert [op for op in needed if op != "deepspeed_shm_comm"] == ops


def test_an_engine_that_is_not_installed_is_unknown() -> None:
    with pytest.raises(KeyError):
        engine_kind("vllm")
    assert engine_names()[: len(ENGINES)] == tuple(ENGINES)


def test_a_configuration_knows_its_rows() -> None:
    config = composed("task=plan", "engine=resident")
    assert task_of(config).worker and not task_of(config).loads_model
    assert not engine_of(config).zero3


def test_copies_change_one_setting_and_nothing_else() -> None:
    config = composed("offload=nvme", "offload.nvme_path='~/swap'")
    assert config.with_batch(7).batch.batch_size == 7
    assert config.with_batch(7).with_batch(config.batch.batch_size) == config
    other = config.changed(weights="pretrained", sweep={"preview": True})
    assert (other.weights, other.sweep.preview, other.batch) == ("pretrained", True, config.batch)
    assert config.offload.nvme_folder == Path.home() / "swap"
    assert composed().offload.nvme_folder is None
