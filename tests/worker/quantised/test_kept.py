"""Packed weights are made once; what is damaged is noticed, said, and made again."""

from __future__ import annotations

import errno
import json
import os
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from zinfer.config import ConfigError
from zinfer.job.events import EventLog
from zinfer.worker.quantised import kept
from zinfer.worker.quantised.kept import MADE, WEIGHTS, Kept, Take, kept_weights

SIZES = {"model.layers.1.weight": 5000, "lm_head.weight": 70, "model.layers.0.weight": 4096}
KEY = {"weights": "abc", "group_size": 64}


def bytes_of(name: str) -> torch.Tensor:
    """Make the packed bytes of a parameter; always the same."""
    chance = torch.Generator().manual_seed(len(name))
    return torch.randint(0, 256, (SIZES[name],), dtype=torch.uint8, generator=chance)


class Maker:
    """Makes the weights, in another order than they are stored, and counts how often."""

    def __init__(self) -> None:
        self.times = 0

    def __call__(self, take: Take) -> None:
        """Hand over all weights."""
        self.times += 1
        for name in sorted(SIZES):
            take(name, bytes_of(name))


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("ZINFER_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantised"


@pytest.fixture
def events(tmp_path: Path) -> EventLog:
    return EventLog(tmp_path)


def said(tmp_path: Path) -> str:
    """Return everything that was written as an event."""
    return "".join(path.read_text() for path in tmp_path.glob("events*.jsonl"))


def assert_all_there(found: Kept) -> None:
    for name in SIZES:
        read = found.read(name)
        assert read is not None and torch.equal(read, bytes_of(name)), name


def test_the_second_start_reads_what_the_first_one_made(cache: Path, events: EventLog) -> None:
    make = Maker()
    for _ in range(2):
        found = kept_weights(KEY, SIZES, make, events)
        assert_all_there(found)
    assert make.times == 1
    assert "lm_head.weight" in found and "model.norm.weight" not in found
    with safe_open(found.folder / WEIGHTS, "pt") as file:
        assert set(file.keys()) == set(SIZES), "any reader of safetensors understands it"
    left = [path.name for path in cache.iterdir() if not path.name.endswith(".lock")]
    assert left == [found.folder.name]


@pytest.mark.parametrize("change", [{"weights": "abd"}, {"group_size": 32}, {"more": 1}])
def test_other_weights_or_another_scheme_are_made_apart(
    change: dict[str, object], cache: Path, events: EventLog
) -> None:
    make = Maker()
    first = kept_weights(KEY, SIZES, make, events)
    assert kept_weights({**KEY, **change}, SIZES, make, events).folder != first.folder
    assert make.times == 2


def test_a_new_version_of_the_search_makes_them_again(
    cache: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    kept_weights(KEY, SIZES, make, events)
    monkeypatch.setattr(kept, "VERSION", kept.VERSION + 1)
    kept_weights(KEY, SIZES, make, events)
    assert make.times == 2


def cut_short(folder: Path) -> None:
    """Cut the weights in half."""
    os.truncate(folder / WEIGHTS, (folder / WEIGHTS).stat().st_size // 2)


def lose_checksums(folder: Path) -> None:
    """Remove the file of checksums."""
    (folder / MADE).unlink()


def garble_checksums(folder: Path) -> None:
    """Write no JSON."""
    (folder / MADE).write_text("{")


def lose_one(folder: Path) -> None:
    """Take one weight out of the checksums."""
    document = json.loads((folder / MADE).read_text())
    document["sha256"].pop("lm_head.weight")
    (folder / MADE).write_text(json.dumps(document))


@pytest.mark.parametrize("damage", [cut_short, lose_checksums, garble_checksums, lose_one])
def test_damaged_files_are_said_and_made_again(
    damage: Any, cache: Path, events: EventLog, tmp_path: Path
) -> None:
    make = Maker()
    damage(kept_weights(KEY, SIZES, make, events).folder)
    assert_all_there(kept_weights(KEY, SIZES, make, events))
    assert make.times == 2
    assert "made again" in said(tmp_path)


def test_a_flipped_bit_is_noticed_when_its_weight_is_read(cache: Path, events: EventLog) -> None:
    found = kept_weights(KEY, SIZES, Maker(), events)
    with open(found.folder / WEIGHTS, "r+b") as file:
        file.seek(-3, os.SEEK_END)  # in the last weight of SIZES
        byte = file.read(1)
        file.seek(-3, os.SEEK_END)
        file.write(bytes([byte[0] ^ 1]))
    assert found.read("model.layers.0.weight") is None
    assert found.read("lm_head.weight") is not None


def test_two_that_ask_together_make_them_once(
    cache: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kept, "WAIT_S", 0.01)
    make, has_begun, may_end = Maker(), threading.Event(), threading.Event()

    def slowly(take: Take) -> None:
        has_begun.set()
        assert may_end.wait(60)
        make(take)

    found: list[Kept] = []
    waited: list[bool] = []

    def wait() -> None:
        found.append(kept_weights(KEY, SIZES, make, events, waiting=lambda: waited.append(True)))

    first = threading.Thread(target=lambda: found.append(kept_weights(KEY, SIZES, slowly, events)))
    first.start()
    assert has_begun.wait(60)
    second = threading.Thread(target=wait)
    second.start()
    while not waited:
        time.sleep(0.01)
    may_end.set()
    for thread in (first, second):
        thread.join(60)
    assert len(found) == 2 and make.times == 1
    assert_all_there(found[1])


def test_a_search_that_fails_leaves_nothing(cache: Path, events: EventLog) -> None:
    def fail(take: Take) -> None:
        take("lm_head.weight", bytes_of("lm_head.weight"))
        raise RuntimeError("the text could not be read")

    with pytest.raises(RuntimeError, match="could not be read"):
        kept_weights(KEY, SIZES, fail, events)
    assert [path.name for path in cache.iterdir() if not path.name.endswith(".lock")] == []


def test_what_a_killed_process_left_is_removed(cache: Path, events: EventLog) -> None:
    found = kept_weights(KEY, SIZES, Maker(), events)
    left = found.folder.with_name(f".{found.folder.name}")
    found.folder.rename(left)
    (left / "half").write_bytes(b"1")
    assert_all_there(kept_weights(KEY, SIZES, Maker(), events))
    assert not left.exists() and not (found.folder / "half").exists()


def test_no_room_is_said_before_the_search(
    cache: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    make = Maker()
    monkeypatch.setattr(kept, "_free", lambda folder: 100)
    with pytest.raises(ConfigError, match=r"keeps 9.*100 B left.*ZINFER_CACHE"):
        kept_weights(KEY, SIZES, make, events)
    assert make.times == 0


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_fills_up_meanwhile_is_said(number: int, cache: Path, events: EventLog) -> None:
    def fill(take: Take) -> None:
        raise OSError(number, os.strerror(number))

    with pytest.raises(ConfigError, match=r"left\. Set the environment variable ZINFER_CACHE"):
        kept_weights(KEY, SIZES, fill, events)


def test_a_folder_that_cannot_be_written_is_said(
    tmp_path: Path, events: EventLog, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refuse)
    with pytest.raises(ConfigError, match=r"cannot be written.*dtype\.rounding=nearest"):
        kept_weights(KEY, SIZES, Maker(), events)


@pytest.mark.parametrize("place", ["", "quantised", "quantised/NAME"])
def test_a_file_where_a_folder_should_be_is_said(place: str, cache: Path, events: EventLog) -> None:
    """`NAME` is the folder of the weights themselves."""
    name = kept_weights(KEY, SIZES, Maker(), events).folder.name
    shutil.rmtree(cache.parent)
    (path := cache.parent / place.replace("NAME", name)).parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    with pytest.raises(ConfigError, match=r"cannot be written.*Set .*ZINFER_CACHE"):
        kept_weights(KEY, SIZES, Maker(), events)
    assert path.read_bytes() == b""


def test_another_file_that_cannot_be_read_is_not_taken_for_the_cache(
    cache: Path, tmp_path: Path, events: EventLog
) -> None:
    def read_source(take: Take) -> None:
        (tmp_path / "model.safetensors").read_bytes()

    with pytest.raises(FileNotFoundError):
        kept_weights(KEY, SIZES, read_source, events)


def test_damage_is_not_to_be_downloaded_again(
    cache: Path, tmp_path: Path, events: EventLog
) -> None:
    found = kept_weights(KEY, SIZES, Maker(), events)
    os.truncate(found.folder / WEIGHTS, 3000)
    assert_all_there(kept_weights(KEY, SIZES, Maker(), events))
    assert "is cut short" in said(tmp_path) and "Download" not in said(tmp_path)
