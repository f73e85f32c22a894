"""The texts that a run reads are datasets of its run in MLflow."""

from __future__ import annotations

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

from tests.helpers.tracked_runs import config_of, opened, stored
from zinfer.tracking.inputs import texts_of


def logged(*overrides: str) -> list[tuple[str, Any]]:
    """Return (context, dataset) of everything that a run of this configuration names."""
    inputs = stored(opened(config_of(*overrides))).inputs.dataset_inputs
    return [(item.tags[0].value, item.dataset) for item in inputs]


def test_a_prompt_file_is_a_dataset_with_its_digest_and_path(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("Once upon a time")
    ((context, dataset),) = logged(
        "batch.prompt=file", "batch.prompt_file=prompts.txt", "batch.batch_size=2"
    )
    assert context == "generation"
    assert (dataset.name, dataset.source_type) == ("prompts.txt", "local")
    assert dataset.digest == sha256(b"Once upon a time").hexdigest()[:16]
    assert json.loads(dataset.source) == {"uri": str(tmp_path / "prompts.txt")}
    assert json.loads(dataset.profile) == {"bytes": 16, "rows": 2, "prompt_tokens": 32}


def test_equal_prompt_texts_have_equal_digests() -> None:
    one, same, other = (
        logged("batch.prompt=text", f"batch.prompt_text={text}")[0][1] for text in "aab"
    )
    assert one.digest == same.digest != other.digest
    assert json.loads(other.source) == {"setting": "batch.prompt_text", "text": "b"}


def test_a_text_from_the_environment_is_not_shown(monkeypatch: Any) -> None:
    monkeypatch.setenv("SECRET_PROMPT", "attack at dawn")
    ((_, dataset),) = logged("batch.prompt=text", "batch.prompt_text=${oc.env:SECRET_PROMPT}")
    assert "dawn" not in dataset.source
    assert dataset.digest == sha256(b"attack at dawn").hexdigest()[:16]


def test_synthetic_prompts_are_no_text_and_the_scored_text_is_an_evaluation() -> None:
    assert logged() == []
    (scored,) = texts_of(config_of("quality.enabled=true", "weights=pretrained"))
    assert (scored.name, scored.context) == ("quality_text.txt", "evaluation")


def test_a_file_that_cannot_be_read_is_left_to_the_worker(tmp_path: Path) -> None:
    (tmp_path / "gone.txt").write_text("x")
    config = config_of("batch.prompt=file", "batch.prompt_file=gone.txt")
    (tmp_path / "gone.txt").unlink()
    assert texts_of(config) == []
