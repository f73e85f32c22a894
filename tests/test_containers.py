"""Read the Dockerfiles and the forge's workflow. This is a linter: no image is built here."""

from __future__ import annotations

import json
import os
import re
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).parents[1]
DOCKERFILES = ("docker/Dockerfile.cpu", "docker/Dockerfile.cuda")
KNOWN = {"ARG", "FROM", "RUN", "ENV", "WORKDIR", "COPY", "ENTRYPOINT", "CMD"}
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
WORKFLOW = ROOT / ".github" / "workflows" / "ci.yml"


def instructions(text: str) -> list[tuple[str, str]]:
    """Return (instruction, arguments) of a Dockerfile, continued lines joined."""
    lines = [line for line in text.splitlines() if not line.lstrip().startswith("#")]
    joined = re.sub(r"\\\n", " ", "\n".join(lines))
    pairs = [line.strip().partition(" ") for line in joined.splitlines() if line.strip()]
    return [(word, " ".join(rest.split())) for word, _, rest in pairs]


def lint(text: str) -> list[str]:
    """List what would stop this Dockerfile from building, as far as the checkout shows it."""
    found = instructions(text)
    problems = [f"{word} is no instruction" for word, _ in found if word not in KNOWN]
    if next((word for word, _ in found if word != "ARG"), "") != "FROM":
        problems.append("it does not begin with FROM")
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for word, rest in found:
        if word == "COPY":
            sources = rest.split()[:-1]
            problems += [f"COPY {name}" for name in sources if not (ROOT / name).exists()]
            if len(sources) > 1 and not rest.endswith("/"):
                problems.append(f"COPY of several files into {rest.split()[-1]}")
        if word == "RUN":
            named = re.findall(r"(?:^|&& )make ([a-z-]+)", rest)
            problems += [f"make {name}" for name in named if name not in targets]
        if word == "ENTRYPOINT":
            program = json.loads(rest)[0]
            problems += [] if program in PROJECT["project"]["scripts"] else [f"command {program}"]
    return problems


@pytest.mark.parametrize("name", DOCKERFILES)
def test_a_linter_and_not_a_build_finds_nothing_wrong_with_a_dockerfile(name: str) -> None:
    assert lint((ROOT / name).read_text()) == []


@pytest.mark.parametrize("name", DOCKERFILES)
def test_an_image_copies_all_that_the_set_up_reads(name: str) -> None:
    copied = {
        source
        for word, rest in instructions((ROOT / name).read_text())
        if word == "COPY"
        for source in rest.split()[:-1]
    }
    wheel = PROJECT["tool"]["hatch"]["build"]["targets"]["wheel"]
    forced = {path.partition("/")[0] for path in wheel["force-include"]}
    read = {"pyproject.toml", "constraints.txt", "Makefile", "scripts", "README.md", "LICENSE"}
    assert (read | set(wheel["packages"]) | forced) - copied == set()


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("RUN make setup", ["it does not begin with FROM"]),
        ("FROM a\nCOPY nothing here/", ["COPY nothing"]),
        ("FROM a\nCOPY README.md LICENSE here", ["COPY of several files into here"]),
        ("FROM a\nRUN echo a \\\n  && make dinner", ["make dinner"]),
        ('FROM a\nENTRYPOINT ["zinfre"]', ["command zinfre"]),
        ("FROM a\nCOPPY a b", ["COPPY is no instruction"]),
    ],
)
def test_the_linter_finds_each_fault(text: str, wanted: list[str]) -> None:
    assert lint(text) == wanted


def test_the_workflow_runs_ci_run_on_a_python_that_zinfer_takes() -> None:
    workflow: dict[Any, Any] = yaml.safe_load(WORKFLOW.read_text())
    assert set(workflow[True]) == {"push", "pull_request"}  # YAML reads `on` as true
    steps = workflow["jobs"]["test"]["steps"]
    assert [step["run"] for step in steps if "run" in step][-1] == ".ci/run"
    assert os.access(ROOT / ".ci" / "run", os.X_OK)
    python = next(step["with"]["python-version"] for step in steps if "with" in step)
    assert f">={python}" == PROJECT["project"]["requires-python"]
