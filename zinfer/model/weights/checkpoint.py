"""Read what a checkpoint's files hold, from their headers alone: names, shapes, dtypes, sizes.

A safetensors file begins with the length of its header (8 bytes, little endian) and the header, a
JSON object of name -> dtype, shape and offsets. Source: github.com/huggingface/safetensors.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from zinfer.config import ConfigError
from zinfer.units import format_bytes

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLE = "pytorch_model.bin"
PICKLE_INDEX = "pytorch_model.bin.index.json"
ADAPTER = "adapter_model.safetensors"
HEADER_LIMIT_BYTES = 100_000_000
"""The format's own limit on a header."""
LFS_POINTER = b"version https://git-lfs"
NAMES_SHOWN = 3
SAMPLES, SAMPLE_BYTES = 64, 1024
"""Places of a file of unknown layout whose bytes are part of a fingerprint, and their size."""


class WrongWeights(RuntimeError):
    """The loaded model does not hold what its checkpoint holds."""


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a checkpoint, as its file's header describes it."""

    file: str
    dtype: str
    """In safetensors' spelling: F32, F16, BF16, F8_E4M3, I32, ..."""
    shape: tuple[int, ...]
    bytes: int
    begin: int | None = None
    """Where its bytes begin in the file; None in a pickle."""

    def places(self) -> tuple[int, ...]:
        """Return where SAMPLE_BYTES of it are read for a fingerprint."""
        if self.begin is None:
            return ()
        middle, last = self.bytes // 2, max(0, self.bytes - SAMPLE_BYTES)
        return (self.begin, self.begin + middle, self.begin + last)


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """The tensors of all files that transformers would read."""

    folder: Path
    files: tuple[str, ...]
    tensors: Mapping[str, StoredTensor]
    sha256: str
    """Hash of every file's name, size and header: another checkpoint has another one.

    The weights themselves are not read for it.
    """

    def fingerprint(self) -> str:
        """Hash the same and samples of each tensor; of pickles, evenly over each file."""
        places: dict[str, list[int]] = {name: [] for name in self.files}
        for stored in self.tensors.values():
            places[stored.file] += stored.places()
        digest = hashlib.sha256(self.sha256.encode())
        for name, found in places.items():
            if found:
                _hash_places(self.folder / name, sorted(found), digest)
            else:
                digest.update(sampled_hash([self.folder / name]).encode())
        return digest.hexdigest()


def sampled_hash(files: Iterable[Path], begin: str = "") -> str:
    """Hash samples of the bytes of files, evenly over each one."""
    digest = hashlib.sha256(begin.encode())
    for path in files:
        last = max(0, path.stat().st_size - SAMPLE_BYTES)
        places = [last * number // (SAMPLES - 1) for number in range(SAMPLES)]
        _hash_places(path, places, digest)
    return digest.hexdigest()


def _hash_places(path: Path, places: Iterable[int], digest: Any) -> None:
    with path.open("rb") as file:
        for place in places:
            file.seek(place)
            digest.update(file.read(SAMPLE_BYTES))


def read_checkpoint(folder: Path, *, allow_pickle: bool) -> Checkpoint:
    """Read the headers of the files that transformers would load from this folder.

    Raises:
        ConfigError: a file is missing, cut short, or not what its name says. Names each of them.
    """
    if (folder / WHOLE).exists():
        return _safetensors(folder, [WHOLE], {})
    if (folder / INDEX).exists():
        placed = _weight_map(folder / INDEX)
        files = sorted(set(placed.values()))
        _require_files(folder, files, placed)
        return _safetensors(folder, files, placed)
    if not allow_pickle:
        raise ConfigError([_no_safetensors(folder)])
    if (folder / PICKLE).exists():
        return _pickles(folder, [PICKLE])
    if (folder / PICKLE_INDEX).exists():
        placed = _weight_map(folder / PICKLE_INDEX)
        files = sorted(set(placed.values()))
        _require_files(folder, files, placed)
        return _pickles(folder, files)
    raise ConfigError([_no_safetensors(folder)])


def read_header(path: Path) -> tuple[dict[str, Any], bytes]:
    """Return the header of a safetensors file, parsed and raw.

    Raises:
        ValueError: says what the file is instead, and what to do.
    """
    size = path.stat().st_size
    if size == 0:
        raise ValueError(f"{path} is empty. Download it again")
    with path.open("rb") as file:
        start = file.read(64)
        if start.startswith(LFS_POINTER):
            raise ValueError(
                f"{path} is a Git LFS pointer, not the weights. Run `git lfs pull` in {path.parent}"
            )
        length = int.from_bytes(start[:8], "little")
        if size < 8 or length > HEADER_LIMIT_BYTES:
            raise ValueError(f"{path} is not a safetensors file: it begins with {start[:16]!r}")
        file.seek(8)
        raw = file.read(length)
    if len(raw) < length:
        raise ValueError(
            f"{path} is cut short: {format_bytes(size)}, its header alone has "
            f"{format_bytes(8 + length)}. Download it again"
        )
    try:
        header = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not a safetensors file: its header is no JSON") from error
    if not isinstance(header, dict):
        raise ValueError(f"{path} is not a safetensors file: its header is no JSON object")
    rows = {name: row for name, row in header.items() if name != "__metadata__"}
    if (fault := _layout_fault(rows)) is not None:
        raise ValueError(f"{path} is damaged: {fault}. Download it again")
    ends = {name: row["data_offsets"][1] for name, row in rows.items()}
    whole = 8 + length + max(ends.values(), default=0)
    if size < whole:
        cut = next(name for name, end in ends.items() if 8 + length + end > size)
        raise ValueError(
            f"{path} is cut short: {size} of {whole} bytes, from tensor {cut} on. Download it again"
        )
    return header, raw


def _layout_fault(rows: Mapping[str, Any]) -> str | None:
    """Say which tensor a header describes wrongly; None: each has the bytes that it needs.

    Tensors follow one another without gaps, as the format demands.
    """
    for name, row in rows.items():
        if (fault := _row_fault(row)) is not None:
            return f"tensor {name} has {fault} in the header"
    end = 0
    for name, row in sorted(rows.items(), key=lambda each: each[1]["data_offsets"]):
        kind, shape, (first, last) = row["dtype"], row["shape"], row["data_offsets"]
        if first != end or last < first:
            return f"tensor {name} lies at bytes {first} to {last}, and should begin at {end}"
        bits = SAFETENSORS_BITS.get(kind)
        if bits is not None and math.prod(shape) * bits != 8 * (last - first):
            return (
                f"tensor {name} is {kind} {list(shape)}, which takes "
                f"{math.prod(shape) * bits // 8} bytes, and its place has {last - first}"
            )
        end = last
    return None


def _row_fault(row: Any) -> str | None:
    """Say which field one tensor's description lacks, or holds wrongly; None: none."""
    if not isinstance(row, dict):
        return f"no fields but {json.dumps(row)[:40]}"
    missing = [name for name in ("dtype", "shape", "data_offsets") if name not in row]
    if missing:
        return f"no {' and no '.join(missing)}"
    if not isinstance(row["dtype"], str):
        return f"dtype {json.dumps(row['dtype'])[:40]}, which is no name,"
    for name in ("shape", "data_offsets"):
        found = row[name]
        counts = isinstance(found, list) and all(type(each) is int and each >= 0 for each in found)
        if not counts or (name == "data_offsets" and len(found) != 2):
            what = "two places" if name == "data_offsets" else "sizes"
            return f"{name} {json.dumps(found)[:40]}, which are no {what},"
    return None


def read_into(target: memoryview, path: Path, begin: int) -> int:
    """Fill memory with bytes of a file, so that its pages are nobody's; return how many came."""
    done = 0
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        while done < len(target) and (count := file.readinto(target[done:])):
            done += count
    return done


def first_names(names: Iterable[str]) -> str:
    """Return the first names, in the order of their numbers, and how many more there are."""
    ordered = sorted(names, key=_natural)
    more = len(ordered) - NAMES_SHOWN
    return ", ".join(ordered[:NAMES_SHOWN]) + (f" and {more} more" if more > 0 else "")


def _natural(name: str) -> list[tuple[int, int, str]]:
    """Return a key that sorts layers.2 before layers.10."""
    return [(0, int(part), "") if part.isdigit() else (1, 0, part) for part in name.split(".")]


def _safetensors(folder: Path, files: list[str], placed: Mapping[str, str]) -> Checkpoint:
    """Read the headers of these files; `placed` is what the index says of them."""
    tensors: dict[str, StoredTensor] = {}
    problems: list[str] = []
    twice: dict[tuple[str, str], list[str]] = defaultdict(list)
    digest = hashlib.sha256()
    for file in files:
        try:
            header, raw = read_header(folder / file)
        except (OSError, ValueError) as error:
            problems.append(str(error))
            continue
        digest.update(f"{file} {(folder / file).stat().st_size}\n".encode() + raw)
        for name, row in header.items():
            if name == "__metadata__":
                continue
            if name in tensors:
                twice[tensors[name].file, file].append(name)
            begin, end = row["data_offsets"]
            tensors[name] = StoredTensor(
                file, row["dtype"], tuple(row["shape"]), end - begin, 8 + len(raw) + begin
            )
    for (first, second), names in twice.items():
        problems.append(
            f"{folder}: {first} and {second} both hold {len(names)} of the same tensors "
            f"({first_names(names)}). Remove the file that does not belong to this checkpoint"
        )
    if not problems:
        problems += _stale_index(folder, placed, tensors)
    if problems:
        raise ConfigError(problems)
    return Checkpoint(folder=folder, files=tuple(files), tensors=tensors, sha256=digest.hexdigest())


def _stale_index(
    folder: Path, placed: Mapping[str, str], tensors: Mapping[str, StoredTensor]
) -> list[str]:
    """Name what the index promises and no file holds."""
    lacking: dict[str, list[str]] = defaultdict(list)
    for name, file in placed.items():
        if name not in tensors:
            lacking[file].append(name)
    return [
        f"{folder / file} lacks {len(names)} tensors that {INDEX} places in it "
        f"({first_names(names)}). Download the file and the index again"
        for file, names in lacking.items()
    ]


def _weight_map(index: Path) -> dict[str, str]:
    """Return tensor name -> file of an index."""
    try:
        placed = json.loads(index.read_text())["weight_map"]
        return {str(name): str(file) for name, file in placed.items()}
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise ConfigError(
            [f"{index} is no index of a checkpoint: {error}. Download it again"]
        ) from error


def _require_files(folder: Path, files: list[str], placed: Mapping[str, str]) -> None:
    """Raise ConfigError naming each file of the index that is not there, with its tensors."""
    problems = []
    for file in files:
        if not (folder / file).exists():
            names = [name for name, where in placed.items() if where == file]
            problems.append(
                f"{folder / file} is missing: {len(names)} tensors are in it "
                f"({first_names(names)}). Download or copy this file"
            )
    if problems:
        raise ConfigError(problems)


def _no_safetensors(folder: Path) -> str:
    """Say what a folder has instead of safetensors weights, and what to do."""
    present = {path.name for path in folder.iterdir()}
    shards = sorted(name for name in present if name.endswith(".safetensors"))
    if present & {PICKLE, PICKLE_INDEX}:
        found = sorted(name for name in present if name.startswith("pytorch_model"))
        return (
            f"{folder} has no safetensors weights, only pickles ({first_names(found)}), which can "
            "run code when they are read. Set model.allow_pickle=true if you trust them, "
            "or weights=dummy"
        )
    if ADAPTER in present:
        return (
            f"{folder} holds a PEFT adapter ({ADAPTER}), not a model. "
            "Merge it into its base model and save that"
        )
    if shards:
        return (
            f"{folder} has {first_names(shards)} but no {INDEX}, which says which tensor is where. "
            "Download the index too"
        )
    return (
        f"{folder} has no weights: neither {WHOLE} nor {INDEX} is there. "
        "Download them, or set weights=dummy"
    )


def _pickles(folder: Path, files: list[str]) -> Checkpoint:
    """Read names, shapes and dtypes of pickles, without their values."""
    import torch

    tensors: dict[str, StoredTensor] = {}
    digest = hashlib.sha256()
    problems = []
    for file in files:
        path = folder / file
        try:
            held = torch.load(path, map_location="meta", weights_only=True)
        except Exception as error:  # a pickle can fail in any way
            said = (str(error).strip() or type(error).__name__).splitlines()[0]
            problems.append(f"{path} cannot be read: {said}")
            continue
        digest.update(f"{file} {path.stat().st_size}\n".encode())
        if (fault := _pickle_fault(held)) is not None:
            problems.append(f"{path} {fault}")
            continue
        for name, tensor in held.items():
            kind = SAFETENSORS_DTYPES.get(str(tensor.dtype).removeprefix("torch."), "OTHER")
            tensors[name] = StoredTensor(file, kind, tuple(tensor.shape), tensor.nbytes)
            digest.update(f"{name} {kind} {tuple(tensor.shape)}\n".encode())
    if problems:
        raise ConfigError(problems)
    return Checkpoint(folder=folder, files=tuple(files), tensors=tensors, sha256=digest.hexdigest())


def _pickle_fault(held: object) -> str | None:
    """Say what a pickle holds instead of named tensors; None: nothing else."""
    if not isinstance(held, Mapping):
        return f"holds a {type(held).__name__}, not tensors by name. Save model.state_dict()"
    others = [name for name, value in held.items() if not hasattr(value, "nbytes")]
    if others:
        return (
            f"holds more than tensors ({first_names(map(str, others))}): it was saved while "
            "training. Save model.state_dict()"
        )
    return None


SAFETENSORS_DTYPES = {
    "float64": "F64",
    "float32": "F32",
    "float16": "F16",
    "bfloat16": "BF16",
    "int64": "I64",
    "int32": "I32",
    "int16": "I16",
    "int8": "I8",
    "uint8": "U8",
    "bool": "BOOL",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e5m2": "F8_E5M2",
}
"""torch's name of a dtype -> safetensors' name."""
SAFETENSORS_BITS = {
    **dict.fromkeys(("F64", "I64", "U64", "C64"), 64),
    **dict.fromkeys(("F32", "I32", "U32"), 32),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 16),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    "F4": 4,
}
"""safetensors' name of a dtype -> bits of one element. Source: safetensors, tensor.rs."""
