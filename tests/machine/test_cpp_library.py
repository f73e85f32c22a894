"""zinfer's own kernels are compiled once, never required, and found again."""

from __future__ import annotations

from pathlib import Path

import pytest

from zinfer.machine import cpp_library
from zinfer.machine.cpp_library import CannotBuild, build_library, is_built


@pytest.fixture
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path


def source(folder: Path, text: str = 'extern "C" int seven() { return 7; }\n') -> Path:
    path = folder / "small.cpp"
    path.write_text(text)
    return path


def test_a_source_is_compiled_once(empty_cache: Path) -> None:
    import ctypes

    small = source(empty_cache)
    assert not is_built(small)
    library = build_library(small)
    assert ctypes.CDLL(str(library)).seven() == 7
    written = library.stat().st_mtime_ns
    assert build_library(small) == library
    assert library.stat().st_mtime_ns == written
    assert [path.name for path in library.parent.iterdir()] == [library.name], "no leftovers"


def test_a_changed_source_and_another_processor_have_libraries_of_their_own(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = build_library(source(empty_cache))
    second = build_library(source(empty_cache, 'extern "C" int seven() { return 8; }\n'))
    monkeypatch.setattr(cpp_library, "_processor", lambda: ("another",))
    third = build_library(source(empty_cache))
    assert len({first, second, third}) == 3


@pytest.mark.parametrize(
    ("compiler", "text", "says"),
    [
        (None, "", "no C\\+\\+ compiler was found"),
        ("c++", "this is no C++", "does not compile small.cpp"),
        ("false", "int x;", "does not compile small.cpp"),
    ],
)
def test_what_cannot_be_compiled_says_why(
    empty_cache: Path, monkeypatch: pytest.MonkeyPatch, compiler: str | None, text: str, says: str
) -> None:
    monkeypatch.setattr(cpp_library, "_compiler", lambda: compiler)
    with pytest.raises(CannotBuild, match=says):
        build_library(source(empty_cache, text))
    assert not list((empty_cache / "cache").rglob("*.so*"))
