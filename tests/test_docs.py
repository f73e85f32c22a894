"""Documents say what is true: links lead somewhere; commands, options and files exist."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

from multirun_analysis.__main__ import parser
from tests.helpers.composing import choices
from zinfer.job import files

ROOT = Path(__file__).parents[1]
PAGES = sorted(
    path for folder in (ROOT, ROOT / "docs", ROOT / "tests") for path in folder.glob("*.md")
)
NAMES = [path.relative_to(ROOT).as_posix() for path in PAGES]
SURFACE = json.loads((ROOT / "tests" / "data" / "public_surface.json").read_text())
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)")
SPAN = re.compile(r"`([^`\n]+)`")


def prose(page: Path) -> str:
    """Return the text of a page without its code blocks."""
    return re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as forges make them."""
    heads = re.findall(r"^#+ +(.*)$", prose(page), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def commands(page: Path) -> list[str]:
    """Return the commands in code blocks, indented lines and code spans, without their comments."""
    text = page.read_text()
    blocks = re.findall(r"^```(?:bash|sh|console)?\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in blocks for line in block.splitlines()]
    lines += [line for line in text.splitlines() if line.startswith("    ")]
    lines += SPAN.findall(prose(page))
    return [re.split(r"\s{2,}#|\s#\s", line.strip())[0].strip() for line in lines]


@pytest.mark.parametrize("name", NAMES)
def test_every_link_and_anchor_leads_somewhere(name: str) -> None:
    page = ROOT / name
    lost = []
    for target in LINK.findall(prose(page)):
        if target.startswith(("https://", "http://", "mailto:")):
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        if not linked.exists() or (anchor and anchor not in anchors(linked)):
            lost.append(target)
    assert lost == []


@pytest.mark.parametrize("name", NAMES)
def test_every_make_target_exists(name: str) -> None:
    makefile = (ROOT / "Makefile").read_text()
    targets = set(re.findall(r"^([a-z-]+):", makefile, re.MULTILINE))
    named = {
        word
        for command in commands(ROOT / name)
        if command.startswith("make ")
        for word in command.split()[1:]
        if re.fullmatch(r"[a-z-]+", word) and not word.startswith("-")
    }
    assert named <= targets


def known_setting(name: str) -> bool:
    """Tell if an override's name is a setting, a group or one of Hydra's."""
    name = name.lstrip("+~")
    free = ("hydra", "model.overrides", "tracking.tags", "hardware.device_flops_per_s")
    return (
        name in SURFACE["overrides"]
        or name in ("model", "hardware")
        or (name in SURFACE["groups"] or name.partition("/")[0] == "hydra" or name.startswith(free))
    )


@pytest.mark.parametrize("name", NAMES)
def test_every_override_of_a_command_exists(name: str) -> None:
    unknown = [
        word
        for command in commands(ROOT / name)
        if re.match(r"(\.venv/bin/)?zinfer( |$)", command)
        for word in (part.strip("'\"") for part in command.split()[1:])
        if "=" in word and not known_setting(word.partition("=")[0])
    ]
    assert unknown == []


@pytest.mark.parametrize("name", NAMES)
def test_every_choice_of_a_command_exists(name: str) -> None:
    groups = {group: set(choices(group)) for group in (*SURFACE["groups"], "model", "hardware")}
    groups["experiment"] |= {f"tiny/{choice}" for choice in groups["experiment"]}
    wrong = [
        word
        for command in commands(ROOT / name)
        if re.match(r"(\.venv/bin/)?zinfer ", command) and "--config-dir" not in command
        for word in command.split()[1:]
        for group, _, values in [word.partition("=")]
        if group in groups and not re.search(r"[A-Z/.(]", values.removeprefix("tiny/"))
        if not set(values.split(",")) <= groups[group]
    ]
    assert wrong == []


@pytest.mark.parametrize("name", NAMES)
def test_every_option_of_zinfer_report_exists(name: str) -> None:
    known = {option for action in parser()._actions for option in action.option_strings}
    named = {
        word.partition("=")[0]
        for command in commands(ROOT / name)
        if re.match(r"(\.venv/bin/)?zinfer-report ", command)
        for word in command.split()[1:]
        if word.startswith("--")
    }
    assert named <= known


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_file_and_module_that_a_page_names_exists(name: str) -> None:
    roots = ("zinfer/", "conf/", "tests/", "docs/", "bench/", "scripts/", "multirun_analysis/")
    spans = [span.rstrip("/") for span in SPAN.findall(prose(ROOT / name))]
    paths = [span for span in spans if span.startswith(roots) and " " not in span]
    assert [path for path in paths if not list(ROOT.glob(path))] == []
    modules = re.findall(r"-m (zinfer[\w.]*)", (ROOT / name).read_text())
    assert [module for module in modules if find_spec(module) is None] == []


@pytest.mark.parametrize("name", [name for name in NAMES if name != "CHANGELOG.md"])
def test_every_source_that_a_page_names_by_its_last_part_exists(name: str) -> None:
    sources = {path.name for path in ROOT.rglob("*.py")} | {"report.html"}
    named = re.findall(r"`(\w+\.py)`", prose(ROOT / name))
    assert [source for source in named if source not in sources] == []


def test_modules_that_code_and_make_start_exist() -> None:
    sources = [ROOT / "Makefile", *ROOT.glob("scripts/*"), *ROOT.glob("bench/*.py")]
    sources += [*ROOT.glob("zinfer/**/*.py"), *ROOT.glob("tests/**/*.py")]
    pattern = re.compile(r"""-m["']?,? ["']?(zinfer(?:\.\w+)*)""")
    named = {found for path in sources for found in pattern.findall(path.read_text())}
    assert "zinfer.worker" in named
    assert [module for module in sorted(named) if find_spec(module) is None] == []


def test_the_drawing_of_the_rooms_is_current() -> None:
    check = [sys.executable, "scripts/draw_rooms.py", "--check"]
    done = subprocess.run(check, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_architecture_names_every_room_and_every_file_of_a_job() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text()
    rooms = [path.parent.name for path in (ROOT / "zinfer").glob("*/__init__.py")]
    assert [room for room in rooms if f"`{room}/`" not in text] == []
    names = [
        value.format(rank=1)
        for constant, value in vars(files).items()
        if constant.isupper() and isinstance(value, str) and not constant.endswith("VARIABLE")
    ]
    assert [name for name in names if name not in text] == []


def test_every_page_is_reached_from_the_readme() -> None:
    reached, waiting = set(), [ROOT / "README.md"]
    while waiting:
        page = waiting.pop()
        reached.add(page)
        for target in LINK.findall(prose(page)):
            linked = (page.parent / target.partition("#")[0]).resolve()
            if linked.suffix == ".md" and linked.exists() and linked not in reached:
                waiting.append(linked)
    assert [page.name for page in PAGES if page not in reached] == []
