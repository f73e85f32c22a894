"""MLflow's compare page opens with what differs and matters.

Its parallel coordinates begin with the first three differing parameters, by name, and the first
metric that all runs have, in the order of the store. Seen in MLflow 3.17's own code.
"""

from __future__ import annotations

from itertools import product

import pytest

from tests.helpers.composing import composed
from tests.helpers.tracked_runs import OUTCOME, config_of, opened, stored
from zinfer.tracking.run import run_params

SHOWN_AT_FIRST = 3
SWEEPS = [
    (
        [["model=opt-125m", "model=bloom-560m"], ["offload=none", "offload=cpu", "offload=nvme"],
         ["batch.batch_size=1", "batch.batch_size=8"]],
        ["batch.batch_size", "model.name", "offload.device"],
    ),
    (
        [["kv_cache=device", "kv_cache=host"], ["offload=none", "offload=cpu"]],
        ["kv_cache.placement", "offload.device"],
    ),
    (
        [["dtype=bfloat16", "dtype=float16"], ["offload=none", "offload=cpu"]],
        ["dtype.compute", "dtype.weights", "offload.device"],
    ),
    (
        [["engine=zero", "engine=resident"], ["model=opt-125m", "model=llama-3-8b"]],
        ["engine.name", "model.name"],
    ),
    ([["zero=tuned", "zero=paper"], ["offload=cpu"]], ["zero.derivation"]),
    ([["zero=tuned", "zero=paper"], ["dtype=int4"]], ["zero.derivation"]),
    ([["dtype=bfloat16", "dtype=int8", "dtype=int4"]], ["dtype.weights"]),
    (
        [["dtype=bfloat16", "dtype=int4"], ["dtype.rounding=nearest", "dtype.rounding=searched"],
         ["weights=pretrained"]],
        ["dtype.rounding", "dtype.weights"],
    ),
    (
        [["weights=dummy", "weights=pretrained"], ["quality.enabled=auto"]],
        ["weights"],
    ),
    ([["quality.enabled=false", "quality.enabled=true"], ["weights=pretrained"]],
     ["quality.enabled"]),
]  # fmt: skip


@pytest.mark.parametrize(("axes", "wanted"), SWEEPS)
def test_the_parameters_at_first_are_what_was_swept(
    axes: list[list[str]], wanted: list[str]
) -> None:
    runs = [run_params(composed(*overrides)) for overrides in product(*axes)]
    keys = sorted({name for params in runs for name in params})
    differing = [name for name in keys if len({params.get(name) for params in runs}) > 1]
    assert differing[:SHOWN_AT_FIRST] == wanted
    assert differing == wanted, "nothing differs that only follows from the choices"


def test_the_metric_at_first_is_the_headline() -> None:
    for number in range(2):
        run = opened(config_of(f"batch.batch_size={number + 1}"))
        run.finish(OUTCOME)
        assert next(iter(stored(run).data.metrics)) == "generated_tokens_per_s"
