"""A mistake on the command line ends as a sentence with what to set, never as a traceback."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import zinfer
from tests.helpers.composing import CONF, choices, composed
from zinfer import __version__
from zinfer.config.command_line import (
    WORDS,
    argument_problems,
    may_choose_mode,
    name_of_hub_id,
    normalised,
    override_problems,
    wants_json,
)
from zinfer.config.explain import attribute_docstrings, explain, overview
from zinfer.config.run_config import RunConfig
from zinfer.config.sentences import settings
from zinfer.config.tasks import TASKS


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        (["plan", "model=opt-175b"], ["task=plan", "model=opt-175b"]),
        (["run"], ["task=run"]),
        (["calibrate", "-m"], ["-m", "task=calibrate"]),
        (["sweep", "model=a,b"], ["-m", "model=a,b"]),
        (["model=a,b", "--multirun"], ["--multirun", "model=a,b"]),
        (["batch.prompt_text=plan"], ["batch.prompt_text=plan"]),
        (["offload.nvme_path=~/x"], [f"offload.nvme_path={Path.home()}/x"]),
        (["model.source=~"], [f"model.source={Path.home()}"]),
        (["~experiment", "batch.prompt_text='~/x'"], ["~experiment", "batch.prompt_text='~/x'"]),
        ([], []),
    ],
)
def test_words_stand_for_overrides(typed: list[str], meant: list[str]) -> None:
    assert normalised(typed) == meant


@pytest.mark.parametrize(
    ("override", "says"),
    [
        ("batch.batchsize=4", "Set batch.batch_size=4"),
        ("batchsize=4", "Set batch.batch_size=4"),
        ("batch.batch-size=4", "Set batch.batch_size=4"),
        ("+offload.nvmepath=/x", "Set offload.nvme_path=/x"),
        ("ofload=cpu", "Set offload=cpu"),
        ("wieghts=dummy", "Set weights=dummy"),
        ("model=opt-125", "Set model=opt-125m"),
        ("model=opt_1.3b", "Set model=opt-1.3b"),
        ("model=facebook/opt-125m", "Set model=opt-125m"),
        ("model=Facebook/OPT-125M", "Set model=opt-125m"),
        ("model=google/gemma-3-1b", "Set model=custom model.source=google/gemma-3-1b"),
        ("model=/tmp", "Set model=custom model.source=/tmp"),
        ("model=null", "Set model=opt-125m; choices: "),
        ("dtype=fp16", "Set dtype=float16"),
        ("offload=gpu", "Set offload=none"),
        ("offload=disk", "Set offload=nvme"),
        ("kv_cache=cpu", "Set kv_cache=host"),
        ("dtype=4bit", "Set dtype=int4"),
        ("dtype=8-bit", "Set dtype=int8"),
        ("dtype.bits=4", "Set dtype=int4"),
        ("dtype.bits=3", "Set dtype=int4 or dtype=int8 or dtype=bfloat16"),
        ("engine=deepspeed", "Set engine=zero"),
        ("batch=8", "Set batch.batch_size=8"),
        ("batch.size=8", "Set batch.batch_size=8"),
        ("++batch.foo=4", "zinfer --explain batch shows the settings of batch"),
        ("kv_cache.place=host", "Set kv_cache.placement=host"),
        ("serve", "Try zinfer --help"),
        ("opt125m", "Set model=opt-125m"),
        ("hardware=h100", "Set hardware=h100_2nvme"),
        ("hardware=H100", "Set hardware=h100_2nvme"),
        ("hardware=a600", "Set hardware=a6000"),
        ("hardware=tpu", "choices: a100"),
        ("kv_cache=host-attention", "Set kv_cache=host_attention"),
        ("model=opt", "Set model=opt-"),
        ("experiment=demmo", "Set experiment=demo"),
        ("opt-125m", "Set model=opt-125m"),
        ("pln", "Try zinfer plan"),
        ("xyzzy.colour=red", "zinfer --cfg job shows all settings"),
    ],
)
def test_a_mistyped_name_is_answered_with_the_one_that_exists(override: str, says: str) -> None:
    (problem,) = override_problems(override)
    assert says in problem


@pytest.mark.parametrize(
    "override",
    ["model=opt-125m,opt-350m", "+tracking.tags.a=b", "hydra.run.dir=/x", "~experiment",
     "model.overrides.num_hidden_layers=2", "batch.batch_size=1,2", "experiment=null",
     "model=glob(opt*)"],
)  # fmt: skip
def test_what_is_right_is_not_complained_about(override: str) -> None:
    assert override_problems(override) == []


@pytest.mark.parametrize(
    ("typed", "given"),
    [
        ("model.overrides.num_hidden_layers=2", "++model.overrides.num_hidden_layers=2"),
        ("tracking.tags.team=red", "++tracking.tags.team=red"),
        ("hardware.device_flops_per_s.int8=1e12", "++hardware.device_flops_per_s.int8=1e12"),
        ("+tracking.tags.a=b", "+tracking.tags.a=b"),
        ("batch.batch_size=2", "batch.batch_size=2"),
    ],
)
def test_a_key_of_the_readers_own_needs_no_plus(typed: str, given: str) -> None:
    assert normalised([typed]) == [given]


def test_keys_of_the_readers_own_compose_from_python_too() -> None:
    own = ["model.overrides.ffn_dim=64", "tracking.tags.team=red"]
    config = zinfer.compose(overrides=own)
    assert config.model.overrides["ffn_dim"] == 64
    assert config.tracking.tags == {"team": "red"}


def test_every_model_of_the_hub_is_found_by_its_hub_id() -> None:
    assert name_of_hub_id("meta-llama/Llama-3.1-8B") == "llama-3.1-8b"
    assert name_of_hub_id("facebook/opt-125") is None


def test_flags_are_checked_before_hydra_sees_them() -> None:
    assert argument_problems(["--xyz"]) == ["--xyz is no option. Try zinfer --help"]
    assert argument_problems(["--versoin"]) == ["--versoin is no option. Try zinfer --version"]
    assert argument_problems(["--model=opt-125m", "--batch-size", "8"]) == [
        "--model=opt-125m is no option: settings have no dashes. Set model=opt-125m",
        "--batch-size is no option: settings have no dashes. Set batch.batch_size=VALUE",
    ]
    assert argument_problems(["--resolve"])
    assert not argument_problems(["--cfg", "job", "--resolve"])
    assert wants_json(["a=b", "++format=json"]) and not wants_json(["format=text"])


@pytest.mark.parametrize(
    ("word", "may"),
    [
        ("hydra.mode=MULTIRUN", True),
        ("++hydra.mode=RUN", True),
        ("experiment=mine", True),
        ("+experiment=mine", True),
        ("--config-dir=/x", True),
        ("-cd", True),
        ("hydra.searchpath=[file:///x]", True),
        ("hydra/sweeper=mine", True),
        ("batch.batch_size=2", False),
        ("hydra.run.dir=x", False),
    ],
)
def test_who_may_choose_hydras_mode(word: str, may: bool) -> None:
    assert may_choose_mode(["model=opt-125m", word]) is may


COUNTED = """
import sys
from hydra._internal.hydra import Hydra
from zinfer.__main__ import command
composed, own = [], Hydra.compose_config
Hydra.compose_config = lambda *args, **named: composed.append(1) or own(*args, **named)
command(sys.argv[1:])
print(len(composed))
"""


def test_a_refused_configuration_is_composed_once(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", COUNTED, "launcher.ranks=0"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
        capture_output=True,
        text=True,
        check=True,
    )
    assert "launcher.ranks=0" in done.stderr
    assert done.stdout.splitlines()[-1] == "1"


HELP: str = yaml.safe_load((CONF / "hydra/help/zinfer.yaml").read_text())["template"]
DEFAULTS = composed()


@pytest.mark.parametrize("word", [*WORDS, "report", "--version", "--explain", "--cfg job"])
def test_help_says_each_word_and_option_in_a_line(word: str) -> None:
    lines = [line for line in HELP.splitlines() if line.startswith(f"{word} ")]
    assert len(lines) == 1
    if word in TASKS:
        assert f"task={word}" in lines[0] and lines[0].endswith(f": {TASKS[word].summary}")


@pytest.mark.parametrize(
    "name",
    [
        *("weights", "format", "profile", "plan.enforce"),
        *(name for name in settings() if name.startswith("sweep.") and "parent" not in name),
    ],
)
def test_help_says_each_setting_of_a_sweep_with_its_default(name: str) -> None:
    room, _, field = name.rpartition(".")
    value = getattr(getattr(DEFAULTS, room) if room else DEFAULTS, field)
    assert f"\n{name}={str(value).lower()} " in HELP


def test_help_fits_a_line() -> None:
    assert max(map(len, HELP.splitlines())) <= 100


def test_an_experiment_is_explained_by_its_sentence() -> None:
    said = explain("experiment")
    assert "experiment=demo" in said and "@package" not in said


@pytest.mark.parametrize("name", [*settings(), "offload", "engine", "model", "experiment"])
def test_every_setting_and_group_is_explained(name: str) -> None:
    assert name in explain(name)


@pytest.mark.parametrize("name", sorted(settings()))
def test_every_setting_has_words_of_its_own_in_the_words_of_yaml(name: str) -> None:
    words = [line for line in explain(name).splitlines()[1:] if not line.startswith("default: ")]
    assert words
    assert "None" not in explain(name)


def test_an_explanation_has_type_bounds_default_and_words() -> None:
    said = explain("launcher.ranks")
    assert "int from 1 to 1024" in said and "default: 1" in said and "data-parallel" in said
    assert "calibrate" in explain("task")
    assert all(f"dtype={choice}" in explain("dtype") for choice in choices("dtype"))
    assert "DeepSpeed ZeRO stage 3" in explain("engine=zero")
    assert explain("batch.batch_size=4") == explain("batch.batch_size")
    first_words = {line.split(" ")[0].rstrip(":") for line in overview().splitlines()}
    assert {name.partition(".")[0] for name in settings()} <= first_words
    assert attribute_docstrings(RunConfig)["task"] == "One of TASKS."
    with pytest.raises(ValueError, match=r"Try zinfer --explain batch\.batch_size"):
        explain("batch.batchsize")


# In a process of its own


def shell(folder: Path, command: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Run `command` in bash; `zinfer` in it is ours."""
    program = f'zinfer() {{ "{sys.executable}" -m zinfer "$@"; }}; set -o pipefail; {command}'
    return subprocess.run(
        ["bash", "-c", program],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2]), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )


MISTAKES = [
    ("batch.batchsize=4", "Set batch.batch_size=4"),
    ("'tracking.run_name=${oc.env:NOPE}'", "export NOPE=VALUE"),
    ("'batch.seed=${model.nope}'", "leads to no value"),
    ("model=null", "Set model=opt-125m"),
    ("engine=null kv_cache=null", "Set kv_cache=device"),
    ("hydra.run.dir=/proc/x", "Set hydra.run.dir="),
    ("hydra.run.dir=/dev/null/x", "Set hydra.run.dir="),
    ("--resolve", "--cfg job --resolve"),
    ("--nope", "zinfer --help"),
    ("'batch.batch_size=['", "batch.batch_size=["),
    ("model=nope offlod=cpu", "Set offload=cpu"),
    ("'batch=${nope}'", ""),
    ("--config-dir /nowhere/at/all", "not found"),
    ("-m model=opt-125", "Set model=opt-125m"),
    ("-m hydra/launcher=slurm_gp", "Set hydra/launcher=slurm_gpu"),
    ("-m model=opt-125m,optt-125m task=plan", "Set model=opt-125m"),
    ("-m model=opt-125m,optt-125m ofload=cpu", "Set offload=cpu"),
    ("batch.batch_size=1,2 task=plan", "Try zinfer -m batch.batch_size=1,2 task=plan"),
    ("'model=opt-125m batch=paper'", "Set model=opt-125m batch=paper without quotes"),
    ("model = opt-125m", "Set model=opt-125m"),
    ("+batch.batch_size=4", "Set batch.batch_size=4"),
    ("batch.batch_size=eight", "Set batch.batch_size=2"),
    ("batch.max_repeats=no offload=cpu offload.device=ram", "Set offload.device=cpu"),
]


@pytest.mark.parametrize(("typed", "says"), MISTAKES)
def test_a_mistake_is_exit_code_2_one_document_and_no_traceback(
    typed: str, says: str, tmp_path: Path
) -> None:
    done = shell(tmp_path, f"zinfer {typed} format=json", NOPE_SET="1")
    assert done.returncode == 2, done.stderr
    assert "Traceback" not in done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["status"] == "refused"
    assert says in " ".join(found["problems"])
    assert not any(word in done.stdout for word in ("HYDRA_FULL_ERROR", "hydra.cc"))


@pytest.mark.parametrize(
    ("command", "code", "says"),
    [
        ("zinfer --help >&-", 0, ""),
        ("zinfer model=nope >&-", 2, "refused"),
        ("zinfer model=nope >&- 2>&-", 2, ""),
        ("zinfer --help >/dev/full", 1, "could not be written: No space left"),
        ("zinfer --cfg job >/dev/full", 1, "could not be written"),
        ("zinfer model=nope format=json >/dev/full", 2, "could not be written"),
        ("zinfer --help 2>/dev/full", 0, ""),
        ("zinfer --help < /dev/null | true", 141, ""),
        ("zinfer --help | head -1", None, ""),
        ("zinfer --cfg job | head -1", None, ""),
        ("zinfer --version", 0, ""),
    ],
)
def test_output_that_nobody_takes_ends_in_order(
    command: str, code: int | None, says: str, tmp_path: Path
) -> None:
    done = shell(tmp_path, command)
    assert code is None or done.returncode == code, (done.returncode, done.stderr)
    assert says in done.stderr
    assert "Traceback" not in done.stderr and "Exception ignored" not in done.stderr


def test_the_version_is_zinfers(tmp_path: Path) -> None:
    assert shell(tmp_path, "zinfer --version").stdout == f"zinfer {__version__}\n"


@pytest.mark.slow
def test_a_plan_whose_reader_left_still_leaves_its_result(tmp_path: Path) -> None:
    done = shell(tmp_path, "zinfer plan hydra.run.dir=job format=json | true")
    assert done.returncode in (0, 141)
    assert json.loads((tmp_path / "job" / "result.json").read_text())["status"] == "planned"
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "typed",
    ["hydra.mode=MULTIRUN batch.batch_size=1,2", "--config-dir=. experiment=mine"],
)
def test_a_sweep_may_be_asked_for_by_hydras_mode(typed: str, tmp_path: Path) -> None:
    (tmp_path / "experiment").mkdir()
    (tmp_path / "experiment" / "mine.yaml").write_text(
        "# @package _global_\nhydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n"
        "      batch.batch_size: 1,2\n"
    )
    done = shell(tmp_path, f"zinfer {typed} task=plan model=tiny-llama tracking=none format=json")
    assert done.returncode == 0, done.stderr
    assert len(json.loads(done.stdout)["plans"]) == 2


@pytest.mark.slow
def test_hydras_own_files_have_no_secret(tmp_path: Path) -> None:
    secrets = {"SMTP_PASS": "hunter2hunter2", "WHO": "mallory-x"}
    done = shell(
        tmp_path,
        'zinfer plan hydra.run.dir=job tracking=none format=json "+tracking.tags.a=$SMTP_PASS"'
        " '+tracking.tags.b=${oc.env:WHO}' +tracking.tags.db_password=typed-by-hand",
        **secrets,
    )
    assert done.returncode == 0, done.stderr
    files = [path for path in (tmp_path / "job").rglob("*") if path.is_file()]
    assert {".hydra", "job"} <= {path.parent.name for path in files}
    for path in files:
        for secret in (*secrets.values(), "typed-by-hand"):
            if path.name == "job.json" and secret != "mallory-x":
                continue  # what was typed, for the worker, and for its owner alone
            assert secret not in path.read_text(), path
    assert "${oc.env:WHO}" in (tmp_path / "job" / "job.json").read_text()
