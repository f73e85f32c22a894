"""Every command of README and docs/ runs, or a table says why it cannot run here.

A command that measures is planned or previewed in its place. Where a page shows what a command
prints, each line that it shows is compared. To renew those lines after a change:

    python -m tests.test_commands write
"""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path

import pytest

from tests.helpers.command_lines import Ran, run_all

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")), ROOT / "CONTRIBUTING.md"]
PROGRAM = re.compile(
    r"(?:[A-Z_]+=\S+ )*(?:sudo )?(?:\.venv/bin/)?"
    r"(zinfer|zinfer-report|make|python|bash|docker|mlflow|srun|pip|pytest|source|eval)(?= |$)"
)
ANSWERS = re.compile(r"task=(plan|upload)|sweep\.preview=true|--(help|explain|cfg|version)\b")
"""zinfer's commands that measure nothing: they run as they are written."""

NOT_HERE = {  # what a command looks like: why no test runs it, or which other test does
    r"zinfer.* task=calibrate": "minutes; tests/calibration runs it with a small budget",
    r"zinfer(-report)?.*[= ][A-Z]{4,}\b": "a word in capitals stands for the reader's own",
    r"zinfer .*hydra/(launcher|sweeper)=": "needs its plugin: make test-launchers, make test-slurm",
    r"zinfer .*experiment=": "tests/config/test_experiments.py plans every job of each preset",
    r"zinfer .*model.source=.*weights=pretrained": "tests/model/test_weights.py loads a folder",
    r"zinfer .*weights=pretrained": "needs the hub, or the demo model; tests/test_newcomer.py",
    r"zinfer (?!.*hardware=).*dtype=float16": "needs a GPU: processors here have no float16",
    r"zinfer-report": "tests/test_newcomer.py reports its own sweep",
    r"(\S+ )?mlflow server": "tests/test_newcomer.py opens its page",
    r"make (demo|demo-model|setup|setup-nvme)$": "minutes; .ci/run sets up, as README says",
    r"make (test|check|docs|format)(?!-)": ".ci/run and tests/test_site.py do it",
    r"make (bench|catalogue)|python bench": "minutes on a quiet machine",
    r"make test-|.*pytest .*slurm": "needs root and a Slurm, or minutes of attacks",
    r"(srun|sudo) ": "needs a Slurm or root",
    r"docker ": "needs a docker daemon; tests/test_containers.py reads the files",
    r"bash scripts/gpu_check": "needs a GPU",
    r".*python -c \"import torch": "asks torch for a GPU",
    r"pip ": "downloads",
    r"source |eval ": "changes the reader's shell; a test below completes a word",
    r".*python .*(scripts[/.]|tests\.|pytest|native_ops)": "other tests call these",
}
OWN_MODEL = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "vocab_size": 128,
}
SHOWN = {  # page: how the commands begin of which it shows what they print
    "README.md": ["zinfer model=opt-175b offload=nvme dtype=float16"],
    "docs/choosing.md": [
        "zinfer model=opt-30b offload=none dtype=float16",
        "zinfer -m model=opt-30b offload=none,cpu,nvme",
    ],
    "docs/extending.md": ["zinfer --config-dir my_conf"],
    "docs/glossary.md": ["zinfer --explain batch.batch_size"],
    "docs/gpu.md": ["zinfer model=opt-1.3b dtype=float16 task=plan hardware=a6000"],
    "docs/kv_cache.md": ["zinfer task=plan model=opt-175b offload=nvme kv_cache=host_attention"],
    "docs/prediction.md": ["zinfer model=llama-3-70b offload=nvme hardware=h100_2nvme"],
    "docs/reproducing.md": ["zinfer -m experiment=zero_inference_a6000 task=plan"],
    "docs/sweeps.md": ["zinfer -m model=opt-125m,opt-1.3b offload=none,cpu,nvme hardware=a6000"],
}


@dataclass(frozen=True)
class Command:
    """Hold a command of a page, and whether it stands in a block of its own."""

    text: str
    in_block: bool


def joined(page: str) -> str:
    """Join each line that ends in a backslash with the next one."""
    return re.sub(r" *\\\n +", " ", page)


def commands(page: str) -> list[Command]:
    """Find the commands of a page: in blocks, and in spans that are whole."""
    page = joined(page)
    fences = re.findall(r"^```(\w*)\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    lines = [line for word, block in fences if word == "bash" for line in block.splitlines()]
    prose = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    lines += [line for line in prose.splitlines() if line.startswith("    ")]
    bare = [re.split(r"\s+#\s", line.strip())[0].strip() for line in lines]
    found = [Command(text, True) for text in bare if PROGRAM.match(text)]
    spans = re.findall(r"`([^`\n]+)`", prose)
    whole = [text for text in spans if PROGRAM.match(text) and " " in text and "<" not in text]
    fragment = re.compile(r"(\.venv/bin/)?zinfer(?!.*(=|--))")
    return found + [Command(text, False) for text in whole if not fragment.match(text)]


EVERY = {
    page.relative_to(ROOT).as_posix(): list(dict.fromkeys(commands(page.read_text())))
    for page in PAGES
}


def shown_commands() -> list[tuple[str, str]]:
    """Return (page, command) of every command whose output a page shows."""
    return [
        (name, next(each.text for each in EVERY[name] if each.text.startswith(beginning)))
        for name, shown in SHOWN.items()
        for beginning in shown
    ]


def reason(command: str) -> str | None:
    """Say why no test runs a command here; None where one does."""
    if command in [text for _, text in shown_commands()]:
        return None
    return next((why for like, why in NOT_HERE.items() if re.match(like, command)), None)


def arguments(command: str, folder: Path) -> list[str]:
    """Turn a page's command into arguments that answer in a second.

    What would measure is planned, or previewed where it is a sweep. A plan is not logged. Paths of
    the reader become a model's folder and a folder of choices.
    """
    for path, own in (("/path/to/a/hf/folder", "model"), ("/path/to/folder", "model")):
        command = command.replace(path, str(folder / own))
    command = command.replace("my_conf", str(folder / "my_conf")).replace("HOST0", "127.0.0.1")
    words = shlex.split(command.removeprefix(".venv/bin/"))[1:]
    if not ANSWERS.search(command):
        words.append("sweep.preview=true" if "-m" in words else "task=plan")
    return [*words, "tracking=none"] if "task=plan" in words else words


def furnish(folder: Path) -> None:
    """Make what the reader of a page has: a model's folder and a folder of choices."""
    (folder / "model").mkdir()
    (folder / "model" / "config.json").write_text(json.dumps(OWN_MODEL))
    for text in re.findall(r"(?:^    .*\n|^\n)+", (ROOT / "docs/extending.md").read_text(), re.M):
        for name, content in re.findall(r"^    # (my_conf/\S+)\n((?:    .*\n)+)", text, re.M):
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(re.sub(r"^    ", "", content, flags=re.M))


def run_pages(folder: Path, wanted: list[str]) -> dict[str, Ran]:
    """Run commands of pages, each in a folder of its own; equal ones once."""
    furnish(folder)
    lines = {command: arguments(command, folder) for command in wanted}
    once = {tuple(words): words for words in lines.values()}
    folders = [folder / str(number) for number in range(len(once))]
    for each in folders:
        each.mkdir()
    ran = dict(zip(once, run_all(list(zip(once.values(), folders, strict=True))), strict=True))
    return {command: ran[tuple(words)] for command, words in lines.items()}


def test_every_command_has_a_way_or_a_reason() -> None:
    """Programs other than zinfer cannot be run here: each has its line in NOT_HERE."""
    found = {command.text for page in EVERY.values() for command in page}
    assert len(found) > 60
    programs = {text: PROGRAM.match(text) for text in found}
    unknown = [
        text
        for text, program in programs.items()
        if (program is None or program[1] != "zinfer") and reason(text) is None
    ]
    assert unknown == []


@pytest.mark.parametrize("page", PAGES[1:-1], ids=lambda path: path.name)
def test_every_page_has_a_command_and_what_it_prints(page: Path) -> None:
    text = page.read_text()
    assert re.search(r"^```\n|# prints: |^\| --|`make docs`", text, re.MULTILINE)
    assert "```python" in text or EVERY[page.relative_to(ROOT).as_posix()]


def test_every_reason_is_needed_and_names_tests_that_exist() -> None:
    found = {command.text for page in EVERY.values() for command in page}
    assert [like for like in NOT_HERE if not any(re.match(like, text) for text in found)] == []
    named = {path for why in NOT_HERE.values() for path in re.findall(r"tests/[\w/.]+", why)}
    assert [path for path in named if not (ROOT / path).exists()] == []


@pytest.mark.slow
def test_every_command_runs_as_the_pages_say(tmp_path: Path) -> None:
    wanted = list(
        dict.fromkeys(
            command.text
            for page in EVERY.values()
            for command in page
            if reason(command.text) is None
        )
    )
    ran = run_pages(tmp_path, wanted)
    failed = {command: found.stderr[-500:] for command, found in ran.items() if found.code}
    assert failed == {}
    assert [command for command, found in ran.items() if "Traceback" in found.stderr] == []
    lost = {
        (name, line)
        for name, command in shown_commands()
        for line in missing(block_after(ROOT / name, command), ran[command].stdout)
    }
    assert lost == set()


def block_after(page: Path, command: str) -> str:
    """Return the block without a language that follows a command: what it prints."""
    after = joined(page.read_text()).partition(f"{command}\n")[2]
    found = re.search(r"^```\n(.*?)^```", after, re.MULTILINE | re.DOTALL)
    assert found, f"{page.name} shows nothing after: {command}"
    return found[1]


def pattern(line: str) -> str:
    """Return the regular expression of a shown line: any spaces, and "..." for anything."""
    parts = [re.escape(" ".join(part.split())) for part in line.split("...")]
    return r"\s?.*\s?".join(part for part in parts)


def missing(shown: str, printed: str) -> list[str]:
    """List shown lines that were not printed, in their order. Width and spaces may differ."""
    rest, lost = [" ".join(line.split()) for line in printed.splitlines()], []
    for line in (line for line in shown.splitlines() if line.strip(" .─")):
        at = next((at for at, text in enumerate(rest) if re.fullmatch(pattern(line), text)), None)
        if at is None:
            lost.append(line)
        else:
            rest = rest[at + 1 :]
    return lost


@pytest.mark.parametrize(
    ("typed", "wanted"),
    [
        ("model=opt-1.", "model=opt-1.3b"),
        ("offload=", "offload=nvme"),
        ("batch.new_", "batch.new_"),
    ],
)
def test_the_tab_key_completes_choices_and_settings(typed: str, wanted: str) -> None:
    """Ask as the shell asks after README's `eval "$(zinfer -sc install=bash)"`."""
    line = f"zinfer {typed}"
    asked = {"COMP_LINE": line, "COMP_POINT": str(len(line)), "PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", "-sc", "query=bash"],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
    )
    assert any(word.startswith(wanted) for word in done.stdout.split()), done.stderr


@pytest.mark.parametrize(
    ("shown", "lost"),
    [
        ("a  1.5 GiB\nc   3", []),
        (" a ... GiB\n...\nc 3", []),
        ("a 1.6 GiB", ["a 1.6 GiB"]),
        ("c 3\na 1.5 GiB", ["a 1.5 GiB"]),
        ("a 1x5 GiB", ["a 1x5 GiB"]),
    ],
)
def test_a_line_that_is_not_printed_is_found(shown: str, lost: list[str]) -> None:
    assert missing(shown, "a 1.5 GiB\nb 2\n  c 3\n") == lost


def main() -> None:
    """Write what commands print into the pages, in place of what these show.

    A line with "..." stays as it is: renew that by hand.
    """
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        ran = run_pages(Path(folder), [command for _, command in shown_commands()])
    for name, command in shown_commands():
        page = ROOT / name
        block = block_after(page, command)
        page.write_text(page.read_text().replace(block, renewed(block, ran[command].stdout)))


def renewed(shown: str, printed: str) -> str:
    """Take for each shown line that was not printed the most similar line with its first word."""
    lines = []
    for line in shown.splitlines():
        alike = [
            text.rstrip() for text in printed.splitlines() if text.split()[:1] == line.split()[:1]
        ]
        if "..." in line or not alike or not missing(line, printed):
            lines.append(line)
        else:
            lines.append(max(alike, key=lambda text: SequenceMatcher(None, line, text).ratio()))
    return "\n".join([*lines, ""])


if __name__ == "__main__":
    if sys.argv[1:] != ["write"]:
        sys.exit("python -m tests.test_commands write")
    main()
