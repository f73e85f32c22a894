"""The Tab key: words, options, values after a comma, presets in folders, choices of settings."""

from __future__ import annotations

import subprocess
import sys

import pytest

from tests.helpers.composing import CONF
from tests.helpers.sweeping import environment
from zinfer.config.completion import completions, hydra_line
from zinfer.config.tasks import TASKS


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("zinfer pl", ["plan"]),
        ("zinfer zero=", ["zero=paper", "zero=tuned"]),
        ("zinfer zero=tuned,", ["zero=tuned,paper"]),
        ("zinfer -m offload=cpu,n", ["offload=cpu,none", "offload=cpu,nvme"]),
        ("zinfer +model=opt-125m,opt-1.", ["+model=opt-125m,opt-1.3b"]),
        ("zinfer experiment=tiny/flex", ["experiment=tiny/flexgen_t4",
                                         "experiment=tiny/flexgen_t4_nvme"]),
        ("zinfer task=", [f"task={name}" for name in TASKS]),
        ("zinfer plan weights=", ["weights=dummy", "weights=pretrained"]),
        ("zinfer sweep.resume=", ["sweep.resume=true", "sweep.resume=false"]),
        ("zinfer dtype.rounding=nearest,", ["dtype.rounding=nearest,searched"]),
        ("zinfer --ver", ["--version"]),
        ("zinfer --explain batch.prompt_t", ["batch.prompt_tokens", "batch.prompt_text"]),
        ("zinfer offload=tape", []),
    ],
)  # fmt: skip
def test_the_last_word_goes_on(line: str, found: list[str]) -> None:
    assert completions(line) == found


@pytest.mark.parametrize(
    "line", ["zinfer mod", "zinfer batch.", "zinfer hydra/launcher=", "zinfer plan "]
)
def test_the_rest_is_hydras(line: str) -> None:
    assert completions(line) is None


def test_every_preset_is_found() -> None:
    files = (CONF / "experiment").rglob("*.yaml")
    presets = {str(path.relative_to(CONF).with_suffix("")) for path in files}
    found = completions("zinfer experiment=")
    assert found is not None and set(found) == {name.replace("/", "=", 1) for name in presets}


@pytest.mark.parametrize(
    ("line", "readable"),
    [
        ("zinfer plan mod", "zinfer task=plan mod"),
        ("zinfer sweep model=opt-125m off", "zinfer model=opt-125m off"),
        ("zinfer --cfg job mod", "zinfer mod"),
        ("zinfer ", "zinfer "),
    ],
)
def test_hydra_gets_a_line_that_it_can_read(line: str, readable: str) -> None:
    assert hydra_line(line) == readable


@pytest.mark.parametrize(
    ("line", "found"), [("zinfer plan mod", "model="), ("zinfer model=opt-125m,opt-66", "opt-66b")]
)
def test_a_shell_gets_the_completions(line: str, found: str) -> None:
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line))}
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", "-sc", "query=bash"],
        env=environment(**asked),
        capture_output=True,
        text=True,
        check=True,
    )
    assert found in done.stdout and done.stderr == ""
