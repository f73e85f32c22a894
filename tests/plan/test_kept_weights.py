"""One rank without offload keeps every weight gathered, and pays for none of them twice."""

from __future__ import annotations

from typing import Any

import pytest

from tests.helpers.composing import composed
from tests.helpers.planning import planned, profile
from zinfer.calibration.measure import job_config
from zinfer.job.calibration import Job
from zinfer.model.spec import model_spec
from zinfer.plan.deepspeed_json import deepspeed_json, model_is_leaf
from zinfer.plan.tiers import ItemKind, TierName
from zinfer.plan.zero_layout import zero_layout

CPU, GPU = "hardware.accelerator=cpu", "hardware=h100_2nvme"


def zero_section(*overrides: str) -> dict[str, Any]:
    config = composed(*overrides)
    spec = model_spec(config.model, compute_dtype="bfloat16")
    found: dict[str, Any] = deepspeed_json(config, spec)["zero_optimization"]
    return found


@pytest.mark.parametrize("model", ["opt-1.3b", "mixtral-8x7b", "deepseek-v3", "tiny-bloom"])
@pytest.mark.parametrize("dtype", ["bfloat16", "int8", "int4"])
def test_the_threshold_keeps_the_largest_parameter_and_no_more(model: str, dtype: str) -> None:
    run = planned(f"model={model}", f"dtype={dtype}", "offload=none", GPU)
    zero = run.deepspeed_json()["zero_optimization"]
    largest = zero_layout(run.config, run.spec).largest_stored_numel
    assert zero["stage3_param_persistence_threshold"] == largest


@pytest.mark.parametrize(
    "overrides",
    [
        ("offload=cpu",), ("offload=nvme",), ("offload=none", "launcher.ranks=2"),
        ("offload=none", "launcher.nodes=2", "launcher.rendezvous=host:29500"),
    ],
    ids="-".join,
)  # fmt: skip
def test_weights_that_are_copied_to_be_gathered_are_released(overrides: tuple[str, ...]) -> None:
    zero = zero_section("model=opt-1.3b", "batch.batch_size=2", *overrides)
    assert zero["stage3_param_persistence_threshold"] == 2048, "norms and biases"


def test_a_number_of_the_users_wins() -> None:
    more = ("model=opt-1.3b", "offload=none")
    own = zero_section(*more, "zero.persistence_threshold_numel=77")
    assert own["stage3_param_persistence_threshold"] == 77


WEIGHTS = {ItemKind.WEIGHTS, ItemKind.STREAMING}


def weights_of(tier: TierName, *overrides: str) -> int:
    """Return the planned bytes of weights and their copies, for one rank."""
    plan = planned("model=llama-3-8b", "dtype=bfloat16", *overrides).plan
    return sum(item.bytes for item in plan.tier(tier).items if item.kind in WEIGHTS)


@pytest.mark.parametrize("where", [CPU, GPU])
@pytest.mark.parametrize("zero", ["tuned", "paper"])
def test_kept_weights_are_planned_once_on_every_device(where: str, zero: str) -> None:
    stored = 2 * 8_030_261_248
    assert weights_of("device", "offload=none", where, f"zero={zero}") == stored


def test_two_gpus_plan_what_they_gather_beside_their_share() -> None:
    two = weights_of("device", "offload=none", GPU, "launcher.ranks=2", "batch.batch_size=2")
    assert two > 8_030_261_248 + 2 * 218_112_000 * 2


def test_a_run_that_fetches_nothing_is_predicted_like_plain_transformers() -> None:
    tiny = ("model=tiny-llama", "dtype=float32", "offload=none", CPU)
    mine, plain, fetching = (
        planned(*tiny, *more, profile=profile()).prediction.decode_step_s
        for more in ((), ("engine=resident",), ("zero.leaf_layers=true",))
    )
    assert mine == plain
    assert fetching is not None and plain is not None and fetching > plain


@pytest.mark.parametrize("leaf", [True, False])
@pytest.mark.parametrize("mode", ["none", "cpu", "nvme"])
def test_a_calibration_measures_zero_while_it_fetches(mode: Any, leaf: bool) -> None:
    job = Job(family="llama", mode=mode, dtype="float32", leaf=leaf)
    config = job_config(job, composed("offload=nvme"))
    spec = model_spec(config.model, compute_dtype="float32")
    zero = deepspeed_json(config, spec)["zero_optimization"]
    assert not model_is_leaf(config)
    assert zero["stage3_param_persistence_threshold"] == job.hidden
    assert zero.get("leaf_module", {}).get("classes") == (["LlamaDecoderLayer"] if leaf else None)
