"""The command line as a person or a script uses it, in processes of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

HEAVY = ("torch", "transformers", "deepspeed")
TINY = (
    "model=tiny-llama",
    "launcher.omp_threads=1",
    "batch.prompt_tokens=4",
    "batch.new_tokens=3",
    "batch.repeats=2",
)


def zinfer(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "zinfer", *arguments],
        cwd=folder,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


def document(done: subprocess.CompletedProcess[str]) -> dict[str, Any]:
    """Read what format=json printed: exactly one JSON document."""
    parsed = json.loads(done.stdout)
    assert isinstance(parsed, dict)
    return parsed


def test_help_shows_groups_choices_and_three_examples(tmp_path: Path) -> None:
    done = zinfer(tmp_path, "--help")
    assert done.returncode == 0
    assert "offload: cpu, none, nvme" in done.stdout
    assert "opt-175b" in done.stdout
    assert done.stdout.split("Examples")[1].count("  zinfer ") >= 3


def test_the_driver_imports_nothing_heavy() -> None:
    code = (
        "import zinfer.__main__, zinfer.driver.run, sys;"
        f"print([name for name in {HEAVY} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_a_refusal_is_exit_code_2_with_every_problem_and_no_traceback(tmp_path: Path) -> None:
    done = zinfer(tmp_path, "batch.batch_size=3", "launcher.ranks=2", "batch.repeats=0")
    assert done.returncode == 2
    assert "Set batch.batch_size=4" in done.stderr
    assert "Set batch.repeats=1" in done.stderr
    assert "Traceback" not in done.stderr + done.stdout


def test_a_refusal_as_json(tmp_path: Path) -> None:
    done = zinfer(tmp_path, "batch.batch_size=0", "format=json")
    assert done.returncode == 2
    refused = document(done)
    assert refused["status"] == "refused"
    assert "batch.batch_size=1" in refused["problems"][0]


@pytest.mark.parametrize(
    "typo", ["offload=disk", "model=opt-125", "batch.batchsize=4", "offload=[", "nosuchgroup=1"]
)
def test_a_typo_is_exit_code_2_and_no_traceback(typo: str, tmp_path: Path) -> None:
    done = zinfer(tmp_path, typo, "format=json")
    assert done.returncode == 2
    assert document(done)["status"] == "refused"
    assert "Traceback" not in done.stderr


@pytest.mark.slow
def test_a_run_prints_one_document_and_leaves_its_files(tmp_path: Path) -> None:
    done = zinfer(tmp_path, *TINY, "format=json")
    assert done.returncode == 0, done.stderr
    result = document(done)
    assert result["status"] == "ok"
    assert result["reason"] is None
    assert len(result["run_id"]) == 32
    assert {
        "parameters",
        "weight_bytes",
        "kv_cache_bytes_per_token",
        "kv_cache_bytes",
        "kv_cache_bytes_paper",
    } <= result["model"].keys()
    assert set(result["plan"]["tiers"]) == {"device", "host", "pinned", "disk"}
    assert result["plan"]["fits"] is True
    assert result["deepspeed"]["zero_optimization"]["stage"] == 3
    metrics = result["metrics"]
    assert metrics["timed_runs"] == 2
    assert metrics["generated_tokens_per_s"] > 0
    assert metrics["total_s_max"] >= metrics["prefill_s_max"] + 2 * metrics["decode_step_s_min"]
    assert metrics["yardstick_s"] > 0
    assert metrics["load_s"] > 0
    assert len(result["generated"]["token_ids"][0]) == 3
    job = Path(result["job_dir"])
    assert {"events.jsonl", "result.json", "worker.log"} <= {path.name for path in job.iterdir()}


@pytest.mark.slow
def test_people_see_the_plan_beside_the_measurement(tmp_path: Path) -> None:
    done = zinfer(tmp_path, *TINY, "tracking=none")
    assert done.returncode == 0, done.stderr
    for word in ("planned", "measured", "KV cache", "generated_tokens_per_s", "median of 2"):
        assert word in done.stdout


@pytest.mark.slow
def test_a_plan_of_opt_175b_takes_no_weights_and_gives_the_json(tmp_path: Path) -> None:
    done = zinfer(
        tmp_path,
        "model=opt-175b",
        "offload=nvme",
        "dtype=float16",
        "task=plan",
        "plan.enforce=false",
        "format=json",
    )
    assert done.returncode == 0, done.stderr
    planned = document(done)
    assert planned["status"] == "planned"
    assert planned["model"]["parameters"] == 174_604_468_224
    assert planned["model"]["kv_cache_bytes_per_token"] == 4_718_592
    assert planned["model"]["kv_cache_bytes_paper"] == 2 * 1 * 48 * 96 * 12288 * 2
    assert planned["deepspeed"]["zero_optimization"]["offload_param"]["buffer_size"] == 617_742_336
    disk = planned["plan"]["tiers"]["disk"]
    assert 0.99 * 349_208_936_448 < disk["needed_bytes"] <= 349_208_936_448


@pytest.mark.slow
def test_what_does_not_fit_is_refused_with_numbers_and_what_to_type(tmp_path: Path) -> None:
    done = zinfer(tmp_path, "model=opt-175b", "dtype=bfloat16", "batch=paper", "format=json")
    assert done.returncode == 2
    result = document(done)
    assert result["status"] == "does_not_fit"
    assert "GiB" in result["reason"]
    assert "plan.enforce=false" in result["reason"]
    assert result["metrics"] == {}


@pytest.mark.slow
def test_a_folder_with_only_a_config_plans_and_runs_dummy_weights(tmp_path: Path) -> None:
    folder = tmp_path / "gpt2"
    folder.mkdir()
    config = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "n_embd": 64,
        "n_layer": 2,
        "n_head": 4,
        "vocab_size": 256,
    }
    (folder / "config.json").write_text(json.dumps(config))
    done = zinfer(
        tmp_path,
        "model=custom",
        f"model.source={folder}",
        *TINY[1:],
        "tracking=none",
        "offload=cpu",
        "dtype=float32",
        "format=json",
    )
    assert done.returncode == 0, done.stderr
    assert document(done)["model"]["architecture"] == "GPT2LMHeadModel"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("source", "says"),
    [
        ("./absent/folder", "model.source"),
        ("nobody/no-such-model-anywhere", "cannot be"),
        (".", "config.json"),
    ],
)
def test_a_model_that_is_not_there_is_a_sentence(source: str, says: str, tmp_path: Path) -> None:
    done = zinfer(
        tmp_path, "model=custom", f"model.source={source}", "tracking=none", "format=json"
    )
    assert done.returncode == 2
    refused = document(done)
    assert refused["status"] == "refused"
    assert says in " ".join(refused["problems"])


@pytest.mark.slow
def test_secrets_reach_no_file_and_no_output(tmp_path: Path) -> None:
    secrets = {
        "HF_TOKEN": "hf_abcdefghijklmnop",
        "MLFLOW_TRACKING_PASSWORD": "correct-horse-battery",
        "AWS_SECRET_ACCESS_KEY": "s3cr3ts3cr3t",
    }
    uri = f"sqlite:///{tmp_path}/runs.db"
    done = zinfer(
        tmp_path,
        *TINY,
        f"tracking.uri={uri}",
        "+tracking.tags.note=correct-horse-battery",
        **secrets,
    )
    assert done.returncode == 0, done.stderr
    written = b"".join(
        path.read_bytes()
        for path in tmp_path.rglob("*")
        if path.is_file() and ".hydra" not in path.parts
    )
    for secret in secrets.values():
        assert secret not in done.stdout + done.stderr
        found = [
            str(path)
            for path in tmp_path.rglob("*")
            if path.is_file() and secret.encode() in path.read_bytes()
        ]
        allowed = [
            path for path in found if path.endswith("job.json") or ".hydra" in path
        ]  # what the user typed, for the worker alone
        assert found == allowed, found
    assert len(written) > 10_000


@pytest.mark.parametrize(
    ("arguments", "unneeded"),
    [
        (["--help"], ("pydantic", "sqlite3", "zinfer.config.run_config", "zinfer.driver.run")),
        (["batch.batch_size=0"], ("mlflow", "zinfer.tracking.store", "zinfer.machine.hardware",
                                  "zinfer.machine.native_ops", "zinfer.driver.run")),
    ],
)  # fmt: skip
def test_what_must_answer_at_once_loads_only_what_it_says(
    arguments: list[str], unneeded: tuple[str, ...], tmp_path: Path
) -> None:
    program = (
        "import sys\nfrom zinfer.__main__ import command\n"
        f"sys.argv = ['zinfer', *{arguments}]\ncommand({arguments})\n"
        f"print([name for name in {unneeded} if name in sys.modules])"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]", done.stderr
