"""Configurations that people have, and broken ones: each ends in the right plan or in a sentence.

tests/data/cases/configs.json holds the files of each folder and how it must end: `plans` with its
parameters, dtype and KV elements per token, or `refused` with parts of the sentence. `trusted` is
the same with model.trust_remote_code=true.
"""

from __future__ import annotations

import base64
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from zinfer.config import ModelConfig
from zinfer.model import limits, spec
from zinfer.model.spec import model_spec

DATA = Path(__file__).parents[1] / "data" / "cases" / "configs.json"
CASES: dict[str, dict[str, Any]] = json.loads(DATA.read_text())
ENDS = [(name, key) for name, case in CASES.items() for key in ("ends", "trusted") if key in case]
THROUGH_THE_COMMAND = ["base", "hidden_str", "pad_id_out_of_range", "latin1", "kv_not_dividing"]


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Count anew, in a cache that belongs to these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("ZINFER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setenv("HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
        patch.setattr("zinfer.model.spec._COUNTED", {})
        yield


def write_case(name: str, folder: Path) -> Path:
    """Write the files of one case into `folder`/NAME."""
    (folder / name).mkdir()
    for file, content in CASES[name]["files"].items():
        if "base64" in content:
            data = base64.b64decode(content["base64"])
        else:
            data = content.get("text", json.dumps(content)).encode()
        (folder / name / file).write_bytes(data)
    return folder / name


@pytest.mark.parametrize(("name", "key"), ENDS, ids=[f"{name}-{key}" for name, key in ENDS])
def test_configuration_ends_as_it_should(name: str, key: str, tmp_path: Path) -> None:
    folder = write_case(name, tmp_path)
    model = ModelConfig(name="custom", source=str(folder), trust_remote_code=key == "trusted")
    end = CASES[name][key]
    if "plans" in end:
        found = model_spec(model)
        assert (found.num_parameters, found.dtype) == (end["plans"], end["dtype"])
        assert found.kv_layers is not None, found.kv_unknown_reason
        assert sum(layer.values_per_token for layer in found.kv_layers) == end["kv"]
        return
    with pytest.raises(ValueError) as refusal:
        model_spec(model)
    said = str(refusal.value).replace(str(folder), "FOLDER")
    assert "\n" not in said
    for part in end["refused"]:
        assert part in said


@pytest.mark.slow
@pytest.mark.parametrize("name", THROUGH_THE_COMMAND)
def test_command_plans_or_refuses_with_exit_code_2(name: str, tmp_path: Path) -> None:
    folder = write_case(name, tmp_path)
    answer = subprocess.run(
        [
            *(sys.executable, "-m", "zinfer", "model=custom", f"model.source={folder}"),
            *("task=plan", "tracking=none", "plan.enforce=false"),
            f"hydra.run.dir={tmp_path / 'run'}",
        ],
        capture_output=True,
        text=True,
    )
    said = answer.stdout + answer.stderr
    assert answer.returncode == (0 if "plans" in CASES[name]["ends"] else 2), said
    assert "Traceback" not in said
    if "refused" in CASES[name]["ends"]:
        assert "config.json" in said


def test_an_override_repairs_a_broken_file(tmp_path: Path) -> None:
    folder = write_case("hidden_str", tmp_path)
    model = ModelConfig(name="custom", source=str(folder), overrides={"hidden_size": 64})
    assert model_spec(model).num_parameters == CASES["base"]["ends"]["plans"]


def test_fewer_layers_shorten_the_lists_of_layers_too(tmp_path: Path) -> None:
    folder = write_case("base", tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["layer_types"] = ["full_attention", "full_attention"]
    (folder / "config.json").write_text(json.dumps(config))
    model = ModelConfig(name="custom", source=str(folder), overrides={"num_hidden_layers": 1})
    assert model_spec(model).num_layers == 1


def test_an_unknown_override_of_a_folder_is_refused(tmp_path: Path) -> None:
    folder = write_case("base", tmp_path)
    model = ModelConfig(name="custom", source=str(folder), overrides={"nope": 1})
    with pytest.raises(ValueError, match=r"llama has no nope.*Leave nope out"):
        model_spec(model)


def test_of_a_multimodal_model_an_override_changes_the_text_part(tmp_path: Path) -> None:
    folder = write_case("llava", tmp_path)
    model = ModelConfig(name="custom", source=str(folder), overrides={"num_hidden_layers": 1})
    found = model_spec(model)
    assert (found.num_layers, found.text_part_of) == (1, "llava")


def test_counting_without_end_stops_at_its_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(spec, "counting_budget", lambda: limits.counting_budget(0.05))
    folder = write_case("base", tmp_path)
    model = ModelConfig(name="custom", source=str(folder), overrides={"num_hidden_layers": 9000})
    with pytest.raises(ValueError, match=r"more than 0 s. It has 9000 layers.*Set a smaller"):
        model_spec(model)
