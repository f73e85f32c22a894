"""Rules for the tests themselves: helpers have one home, and nothing depends on this machine."""

from __future__ import annotations

import ast
from collections import defaultdict
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
MODULES = sorted(TESTS.rglob("*.py"))
TREES = {path.relative_to(TESTS).as_posix(): ast.parse(path.read_text()) for path in MODULES}


def imported(tree: ast.Module) -> set[str]:
    """Return the names of the modules that a module imports, at any depth."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_no_test_module_imports_another() -> None:
    guilty = {
        path: sorted(name for name in imported(tree) if ".test_" in f".{name}")
        for path, tree in TREES.items()
    }
    assert {path: names for path, names in guilty.items() if names} == {}


def test_every_import_from_the_tests_is_absolute() -> None:
    relative = [
        path
        for path, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
    ]
    assert relative == []


def test_no_helper_is_written_twice() -> None:
    """Two functions of more than one statement with the same body belong in tests/helpers."""
    homes: dict[str, list[str]] = defaultdict(list)
    for path, tree in TREES.items():
        for node in tree.body:
            if isinstance(node, ast.FunctionDef) and len(node.body) > 1:
                homes[ast.dump(ast.Module(node.body, []))].append(f"{path}: {node.name}")
    assert [places for places in homes.values() if len(places) > 1] == []


FIXED_PATHS = ("/nonexist", "/no/such", "/does/not")


@pytest.mark.parametrize("path", [path for path in TREES if path != "test_suite.py"])
def test_no_test_relies_on_a_fixed_path_being_absent(path: str) -> None:
    texts = [
        node.value
        for node in ast.walk(TREES[path])
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    assert [text for text in texts if any(fixed in text for fixed in FIXED_PATHS)] == []


def test_every_helper_is_used() -> None:
    """A function in tests/helpers that nothing names is dead."""
    named = {
        node.id
        if isinstance(node, ast.Name)
        else node.attr
        if isinstance(node, ast.Attribute)
        else ""
        for tree in TREES.values()
        for node in ast.walk(tree)
    }
    dead = [
        f"{path}: {node.name}"
        for path, tree in TREES.items()
        if path.startswith("helpers/")
        for node in tree.body
        if isinstance(node, ast.FunctionDef) and node.name not in named
    ]
    assert dead == []
