"""Sentences that people read: docstrings exist, begin plainly and fit a line; pages do too."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MOST_CHARACTERS = 100
RIDDLE = re.compile(r"(What|Of|Whether|How)\b")
NOUN = re.compile(
    r"(?:The|An?|Its?|All|This|These|Each|Every|No|Some|Any|None|True|False)\b"
    r"|(?!Warn\b)\w+ (?:of|->)(?= )"  # no order goes on with "of": "Number of", "Start of"
    r"|\w*[^\Ws]s\b"  # "Bytes", "Tokens": no verb that gives an order ends so, but "Pass" does
)
"""Beginnings of a docstring that tell what a function is, and not what it does."""
SOURCES = sorted(
    path for room in ("zinfer", "multirun_analysis") for path in (ROOT / room).rglob("*.py")
)
PAGES = sorted(path for folder in (ROOT, ROOT / "docs") for path in folder.glob("*.md"))
CPP = sorted((ROOT / "zinfer").rglob("*.cpp"))
CHOICES = sorted((ROOT / "conf").rglob("*.yaml"))

Node = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def described(node: ast.AST, name: str = "") -> Iterator[tuple[str, Node]]:
    """Yield the module, its classes and functions and their methods, with dotted names."""
    if isinstance(node, Node):
        yield name or "module", node
    if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
        return  # functions inside a function are its own business
    for child in ast.iter_child_nodes(node):
        own = getattr(child, "name", "") if isinstance(child, Node) else ""
        yield from described(child, f"{name}.{own}".strip(".") if own else name)


def is_public(name: str, node: Node) -> bool:
    """Tell if others may use it: no part of its name begins with an underscore."""
    is_overload = isinstance(node, ast.FunctionDef) and any(
        ast.unparse(found).endswith(("overload", ".setter")) for found in node.decorator_list
    )
    return not is_overload and not any(part.startswith("_") for part in name.split("."))


def is_called(node: Node) -> bool:
    """Tell if it is a function that people call: a property is read like an attribute."""
    return isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and not any(
        "property" in ast.unparse(found) for found in node.decorator_list
    )


def problems(source: str) -> list[str]:
    """List what is wrong with the docstrings of one module."""
    found = []
    for name, node in described(ast.parse(source)):
        text = ast.get_docstring(node)
        if not text:
            if is_public(name, node):
                found.append(f"{name} has no docstring")
            continue
        first = text.splitlines()[0]
        if RIDDLE.match(first):
            found.append(f"{name} begins with {first.split()[0]}: {first}")
        if is_called(node) and NOUN.match(first):
            found.append(f"{name} does not begin with a verb: {first}")
        if len(first) > MOST_CHARACTERS:
            found.append(f"{name} begins with {len(first)} characters: {first}")
    return found


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_docstrings_exist_begin_plainly_and_fit_a_line(path: Path) -> None:
    assert problems(path.read_text()) == []


@pytest.mark.parametrize(
    ("source", "wanted"),
    [
        ("x = 1", "module has no docstring"),
        ('"""Do."""\ndef run(): ...', "run has no docstring"),
        ('"""Do."""\nclass A:\n    """Hold."""\n    def b(self): ...', "A.b has no docstring"),
        ('"""What is left."""', "module begins with What: What is left."),
        ('"""Do."""\nclass _A:\n    """Of a run."""', "_A begins with Of: Of a run."),
        *(
            (
                f'"""Do."""\ndef run():\n    """{first}"""',
                f"run does not begin with a verb: {first}",
            )
            for first in (
                "The rows.",
                "Bytes of a row.",
                "Tokens so far.",
                "Length of it.",
                "Name -> x.",
            )
        ),
        (f'"""{"x" * 101}"""', f"module begins with 101 characters: {'x' * 101}"),
    ],
)
def test_each_fault_of_a_docstring_is_found(source: str, wanted: str) -> None:
    assert problems(source) == [wanted]


@pytest.mark.parametrize(
    "source",
    [
        '"""Do."""\ndef _own(): ...',
        '"""Do."""\ndef run():\n    """Run."""\n    def inner(): ...',
        '"""Do."""\nclass A:\n    """A."""\n    @property\n    def b(self):\n        """All."""',
        '"""Do."""\ndef run():\n    """Pass it on."""',
        '"""Do."""\ndef run():\n    """Warn of it."""',
        '"""Offer a door."""\nclass A:\n    """However it is."""',
    ],
)
def test_private_and_inner_functions_and_like_words_are_left_alone(source: str) -> None:
    assert problems(source) == []


def long_lines(page: str) -> list[str]:
    """Return lines of prose that are too long; code, tables, pictures and links may be longer."""
    text = re.sub(r"^```.*?^```", "", page, flags=re.MULTILINE | re.DOTALL)
    return [
        line
        for line in text.splitlines()
        if len(line) > MOST_CHARACTERS
        and not line.startswith(("|", "    ", "!["))
        and not re.search(r"\]\([^)]*\)|https?://", line)
    ]


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_prose_of_pages_fits_a_line(path: Path) -> None:
    assert long_lines(path.read_text()) == []


def test_a_long_line_of_prose_is_found_and_code_is_not() -> None:
    line = "a word " * 20
    assert long_lines(f"{line}\n    {line}\n| {line} |\n```\n{line}\n```\n") == [line]


@pytest.mark.parametrize("path", CPP, ids=lambda path: path.name)
def test_lines_of_our_kernels_fit(path: Path) -> None:
    lines = enumerate(path.read_text().splitlines(), 1)
    assert [number for number, line in lines if len(line) > MOST_CHARACTERS] == []


def comment_faults(text: str) -> list[str]:
    """List comment lines of YAML that are too long or say "Type", and a head that is missing.

    A line may be longer when it ends with a link: links cannot be broken.
    """
    lines = text.removeprefix("# @package _global_\n").splitlines()
    comments = [line for line in lines if re.search(r"(^|\s)# ", line)]
    found = [
        line
        for line in comments
        if len(line) > MOST_CHARACTERS and not re.search(r"# (Source: )?https?://\S+$", line)
    ]
    found += [line for line in comments if re.search(r"\b[Tt]ype [\w.]+=", line)]
    return found + [line for line in lines[:1] if not line.startswith("# ")]


@pytest.mark.parametrize("path", CHOICES, ids=lambda path: path.relative_to(ROOT).as_posix())
def test_choices_begin_with_a_comment_and_comments_fit_a_line(path: Path) -> None:
    assert comment_faults(path.read_text()) == []


@pytest.mark.parametrize(
    ("line", "is_fault"),
    [
        ("# " + "a word " * 20, True),
        ("key: 1  # " + "a word " * 20, True),
        ("# For four disks type a.b=4", True),
        ("# Source: https://host/" + "x" * 100, False),
        ("key: a long value " + "x" * 100, False),
    ],
)
def test_each_fault_of_a_comment_is_found(line: str, is_fault: bool) -> None:
    assert comment_faults(f"# A choice.\n{line}\n") == ([line] if is_fault else [])


def test_a_choice_without_a_head_is_found() -> None:
    assert comment_faults("# @package _global_\nkey: 1\n") == ["key: 1"]
