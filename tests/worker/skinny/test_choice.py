"""Choose what multiplies a few rows: by measuring, the same on all ranks, and kept."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from tests.helpers.composing import composed
from zinfer.config import ConfigError, RunConfig
from zinfer.model.spec import model_spec
from zinfer.plan.own_products import Shape, is_worth_it, linear_shapes
from zinfer.worker.quantised import native
from zinfer.worker.skinny import choice as module
from zinfer.worker.skinny import kept, trial
from zinfer.worker.skinny.choice import LinearChoice, linear_choice, slowest
from zinfer.worker.skinny.trial import Trial, timed_both, trial_of, trials

MODEL = ("model=tiny-llama", "dtype=bfloat16", "batch.batch_size=4")


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Give each test a cache of its own; choices need the compiled kernel."""
    if isinstance(reason := native.library(), str):
        pytest.skip(f"needs the compiled kernel: {reason}")
    monkeypatch.setattr(kept, "cache_dir", lambda: tmp_path)
    return tmp_path / kept.FOLDER


def alone(value: Any) -> list[Any]:
    return [value]


def chosen(*overrides: str, on_cpu: bool = True) -> LinearChoice | None:
    config = composed(*MODEL, *overrides)
    return linear_choice(config, spec_of(config), on_cpu=on_cpu, share=alone)


def spec_of(config: RunConfig) -> Any:
    return model_spec(config.model, compute_dtype=config.dtype.compute)


def faster_for(*shapes: Shape) -> Any:
    """Return trials in which our kernel is twice as fast for these shapes only."""

    def made(all_shapes: Any, rows: int, dtype: torch.dtype) -> list[Trial]:
        return [
            Trial(
                out=out, inputs=inputs, own_s=1.0, torch_s=2.0 if (out, inputs) in shapes else 0.9
            )
            for out, inputs in all_shapes
        ]

    return made


def all_shapes() -> list[Shape]:
    config = composed(*MODEL)
    return list(linear_shapes(spec_of(config), config))


def test_a_shape_is_ours_where_it_was_measured_to_be_faster(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    first, *others = all_shapes()
    assert others
    for shapes, kernel in (((first,), "mixed"), ((), "torch"), ((first, *others), "compiled")):
        monkeypatch.setattr(module, "trials", faster_for(*shapes))
        monkeypatch.setattr(module, "kept_trials", lambda key: None)
        found = chosen()
        assert found is not None
        assert (found.kernel, found.own, found.rows) == (kernel, frozenset(shapes), 4)
        told = {(row["out"], row["inputs"]): row["kernel"] for row in found.document()["trials"]}
        assert {shape for shape, name in told.items() if name == "compiled"} == set(shapes)


def test_the_next_run_takes_the_same_choice_without_measuring(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "trials", faster_for(all_shapes()[0]))
    first = chosen()
    monkeypatch.setattr(module, "trials", faster_for(*all_shapes()))
    again, of_other_rows = chosen(), chosen("batch.batch_size=2")
    assert first is not None and again is not None and of_other_rows is not None
    assert (again.own, again.trials) == (first.own, first.trials)
    assert "earlier run" in again.why and "before the run" in first.why
    assert of_other_rows.own != first.own
    for file in cache.iterdir():
        file.write_text("[{")
    spoilt = chosen()
    assert spoilt is not None and spoilt.own == frozenset(all_shapes())


def test_a_cache_that_cannot_be_written_keeps_nothing(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache.write_text("a file where the folder should be")
    monkeypatch.setattr(module, "trials", faster_for(*all_shapes()))
    for _ in range(2):
        found = chosen()
        assert found is not None and "before the run" in found.why


@pytest.mark.parametrize(
    ("overrides", "kernel", "why"),
    [
        (("dtype.kernel=torch",), "torch", "dtype.kernel=torch"),
        (("dtype.kernel=compiled",), "compiled", "dtype.kernel=compiled"),
        (("batch.batch_size=33",), "torch", "more than 32 rows"),
        (("batch.batch_size=64", "dtype.kernel=compiled"), "compiled", "dtype.kernel=compiled"),
    ],
)
def test_nothing_is_measured_where_the_settings_decide(
    overrides: tuple[str, ...], kernel: str, why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(module, "trials")
    found = chosen(*overrides)
    assert found is not None
    assert (found.kernel, found.trials) == (kernel, ())
    assert why in found.why
    assert found.own == (frozenset(all_shapes()) if kernel == "compiled" else frozenset())


def test_rows_are_those_of_one_rank(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trials", faster_for())
    found = chosen("batch.batch_size=64", "launcher.ranks=2")
    assert found is not None and found.rows == 32


@pytest.mark.parametrize(
    "overrides",
    [("dtype=float32",), ("engine=resident",), ("zero=paper",), ("dtype=int8",)],
    ids=lambda value: value[0],
)
def test_baselines_float32_and_packed_layers_have_no_choice(overrides: tuple[str, ...]) -> None:
    assert chosen(*overrides) is None


def test_there_is_no_choice_on_a_gpu() -> None:
    assert chosen(on_cpu=False) is None


def test_layers_that_a_packed_run_keeps_are_chosen_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "trials", faster_for(*all_shapes()))
    found = chosen("dtype=int8", "dtype.compute=bfloat16", "dtype.keep=[q_proj]")
    assert found is not None and len(found.own) == 1


def test_without_a_compiler_pytorch_multiplies_or_the_run_is_refused(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(native, "library", lambda: "no C++ compiler was found")
    found = chosen()
    assert found is not None
    assert (found.kernel, found.why) == ("torch", "no C++ compiler was found")
    with pytest.raises(ConfigError, match=r"no C\+\+ compiler.*Set dtype\.kernel=auto"):
        chosen("dtype.kernel=compiled")


def test_all_ranks_take_pytorchs_products_where_one_has_no_kernel() -> None:
    def share(value: Any) -> list[Any]:
        return [value, "no C++ compiler was found"]

    config = composed(*MODEL, "launcher.ranks=2")
    found = linear_choice(config, spec_of(config), on_cpu=True, share=share)
    assert found is not None
    assert (found.kernel, found.why, found.own) == (
        "torch", "no C++ compiler was found", frozenset(),
    )  # fmt: skip


def test_compiled_is_refused_where_the_kernel_cannot_multiply() -> None:
    with pytest.raises(ConfigError, match=r"runs on the processor.*Set dtype\.kernel=auto"):
        chosen("dtype.kernel=compiled", on_cpu=False)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (("dtype=bfloat16", "dtype.kernel=unpack"), r"packs none\. Set dtype\.kernel=torch"),
        (("dtype=float32", "dtype.kernel=compiled"), r"dtype is float32\. Set dtype\.kernel=auto"),
        (("dtype=bfloat16", "dtype.kernel=compiled", "engine=resident"), "engine=resident are"),
        (("dtype=bfloat16", "dtype.kernel=compiled", "zero=paper"), "zero=paper and"),
    ],
)
def test_values_that_a_type_or_a_baseline_does_not_have_are_refused(
    overrides: tuple[str, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        composed("model=tiny-llama", *overrides)


def test_ranks_decide_by_the_slowest_of_them() -> None:
    quick = Trial(out=8, inputs=4, own_s=1.0, torch_s=2.0)
    slow = Trial(out=8, inputs=4, own_s=3.0, torch_s=2.5)
    (found,) = slowest([[quick], [slow]])
    assert (found.own_s, found.torch_s, found.takes_ours) == (3.0, 2.5, False)


def test_a_calm_turn_counts_and_a_busy_machine_is_noticed() -> None:
    own_s = [0.5, 1.0, 1.0, 1.1, 1.1, 1.2, 1.2]
    busy = trial_of((8, 4), torch_s=[0.9, 2.0, 3.0, 9.0, 9.0, 9.0, 9.0], own_s=own_s)
    calm = trial_of((8, 4), torch_s=[0.9, 2.0, 2.0, 2.1, 2.1, 9.0, 9.0], own_s=own_s)
    assert (calm.torch_s, calm.own_s, calm.takes_ours) == (2.0, 1.0, True)
    assert (busy.torch_s, busy.own_s, busy.takes_ours) == (0.9, 0.5, True)
    assert (busy.is_calm, calm.is_calm) == (False, True)
    assert not slowest([[calm], [busy]])[0].is_calm


def test_the_choice_of_a_busy_moment_is_not_kept(
    cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = faster_for(*all_shapes())
    monkeypatch.setattr(
        module, "trials", lambda *args: [replace(each, is_calm=False) for each in made(*args)]
    )
    found = chosen()
    assert found is not None and found.why.endswith("on a busy machine")
    assert not cache.exists()


def test_a_gain_within_noise_is_none() -> None:
    assert not is_worth_it(1.0, 1.04)
    assert is_worth_it(1.0, 1.06)


def test_a_trial_times_both_ways_with_matrices_of_the_pool(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "BUDGET_S", 0.0)
    seen: dict[str, list[int]] = {"own": [], "torch": []}

    def noting(name: str) -> Any:
        def multiply(x: torch.Tensor, weight: torch.Tensor) -> None:
            assert x.shape == (3, 1, 64)
            seen[name].append(weight.storage_offset())

        return multiply

    monkeypatch.setattr(trial, "own_linear", noting("own"))
    monkeypatch.setattr(trial.functional, "linear", noting("torch"))
    timed_both(torch.zeros(5 * 32 * 64).bfloat16(), 32, 64, rows=3)
    assert len(seen["own"]) == len(seen["torch"]) == 1 + trial.LEAST
    assert sorted({*seen["own"], *seen["torch"]}) == [2048 * place for place in range(5)]


def test_a_matrix_larger_than_its_part_is_timed_by_that_part(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(trial, "BUDGET_S", 0.0)
    monkeypatch.setattr(trial, "COLD_BYTES", 1 << 16)
    monkeypatch.setattr(trial, "PART_BYTES", 1 << 14)
    found = trials({(4096, 64): 2, (32, 64): 1, (3, 10_000): 1}, 2, torch.bfloat16)
    assert [each.shape for each in found] == [(3, 10_000), (32, 64), (4096, 64)]
    assert all(each.own_s > 0 and each.torch_s > 0 for each in found)
