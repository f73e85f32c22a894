"""Every causal language model type of transformers: its parameters and cache bytes, or why not.

tests/data/model_types.json has one row for each type, written by scripts/count_model_types.py from
real small instances. Some rows are tested in every run; all of them, each made and run again, in
the slow ones (a second each; `-n 2` spreads them over two processes).
"""

from __future__ import annotations

import importlib.metadata
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.real_models import ROWS, real_counts
from zinfer.config import ModelConfig
from zinfer.model.spec import kv_cache_bytes, model_spec

ROOT = Path(__file__).parents[2]
TYPES: dict[str, dict[str, Any]] = json.loads(
    (ROOT / "tests" / "data" / "model_types.json").read_text()
)
TESTED_TRANSFORMERS = dict(
    re.findall(r"^(\S+)==(\S+)", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
)["transformers"]
UNKNOWN_ON_PURPOSE = {name for name, row in TYPES.items() if row.get("kv_unknown")}
RUN = sorted(name for name, row in TYPES.items() if "tokens" in row)
FEW = ["biogpt", "cpmant", "gemma3", "jetmoe", "llama", "minimax", "mllama", "recurrent_gemma"]
FEW += ["rwkv", "mamba", "opt", "bloom", "xlnet", "xlstm", "deepseek_v4"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Count anew, in a cache that belongs to these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZINFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr("zinfer.model.spec._COUNTED", {})
        yield


def model_of(name: str) -> ModelConfig:
    """Return the small model of this type's row."""
    return ModelConfig(name=name, model_type=name, overrides=TYPES[name].get("overrides", {}))


def assert_ends_as_its_row(name: str) -> None:
    """Assert that the plan counts what the row says, or knows no more than it."""
    row = TYPES[name]
    if "refused" in row:
        with pytest.raises(ValueError, match=re.escape(row["refused"][:60])):
            model_spec(model_of(name))
        return
    spec = model_spec(model_of(name), compute_dtype="float32")
    assert spec.num_parameters == row["parameters"]
    if "tokens" not in row:
        return
    planned = kv_cache_bytes(spec, ROWS, row["tokens"])
    if planned is None:
        assert spec.kv_unknown_reason, "None needs a reason"
        assert name in UNKNOWN_ON_PURPOSE or row["kv_cache_bytes"] is None
    else:
        assert planned == row["kv_cache_bytes"]


def test_every_type_of_this_transformers_has_a_row() -> None:
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    if importlib.metadata.version("transformers") != TESTED_TRANSFORMERS:
        missing = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(TYPES)
        assert not missing, f"python scripts/count_model_types.py {' '.join(sorted(missing))}"
    else:
        assert set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) == set(TYPES)


def test_no_plan_holds_another_cache_than_the_real_one() -> None:
    """A row may know less than the real instance shows, and never something else."""
    wrong = {
        name: row
        for name, row in TYPES.items()
        if row.get("kv_planned") is not None and row["kv_planned"] != row["kv_cache_bytes"]
    }
    assert not wrong


@pytest.mark.parametrize("name", FEW)
def test_some_types_are_counted_as_they_are(name: str) -> None:
    assert_ends_as_its_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("sparse, heavy", [(4, 128), (4, 8), (3, 16), (7, 20)])
def test_compressed_entries_overlap_and_waiting_tokens_are_counted(sparse: int, heavy: int) -> None:
    rates = {"compressed_sparse_attention": sparse, "heavily_compressed_attention": heavy}
    small = TYPES["deepseek_v4"]["overrides"]
    overrides = {**small, "num_hidden_layers": 5, "compress_rates": rates}
    model = ModelConfig(name="deepseek_v4", model_type="deepseek_v4", overrides=overrides)
    spec = model_spec(model, compute_dtype="float32")
    real = real_counts(model)
    assert {layer.compress_rate for layer in spec.kv_layers or ()} == {sparse, heavy}
    assert kv_cache_bytes(spec, ROWS, real["tokens"]) == real["kv_cache_bytes"]


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(TYPES))
def test_every_type_is_counted_as_it_is(name: str) -> None:
    assert_ends_as_its_row(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", RUN)
def test_row_is_what_a_real_instance_holds(name: str) -> None:
    row = TYPES[name]
    assert real_counts(model_of(name)) == {
        key: row[key] for key in ("parameters", "tokens", "kv_cache_bytes")
    }
