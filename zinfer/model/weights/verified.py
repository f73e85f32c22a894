"""Make sure that every weight of a loaded model came from its checkpoint and is a number.

The rehearsal says that names and shapes agree. What remains to go wrong is loading itself: under
ZeRO-3 weights that were read can be lost on the way to their partitions, without a word. So samples
are taken of each tensor as it is read, and compared with what the finished model holds.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch

from zinfer.job.events import EventLog
from zinfer.model.weights.checkpoint import first_names
from zinfer.model.weights.reading import REPORT_S

WINDOW_NUMEL = 1024
"""Elements that are compared in one place."""
WHOLE_NUMEL = 1 << 16
"""Tensors up to this size are compared whole."""

Gather = Callable[[torch.nn.Parameter], AbstractContextManager[Any]]


@dataclass(frozen=True, kw_only=True)
class VerifiedWeights:
    """The proof of a checkpoint's use, as it is logged."""

    tensors: int
    """Parameters and persistent buffers that were checked; tied ones once."""
    bytes: int
    sha256: str | None
    """Hash of the checkpoint's headers and sizes; None for GGUF."""
    fingerprint: str | None = None
    """Hash of samples of the files' bytes: fine-tuned weights have another one.

    None where an engine keeps none.
    """
    seconds: float
    """How long checking took, before and after loading; not part of load_s."""
    rounding_s: float = 0.0
    """How long searching the codes of quantised weights took; not part of load_s."""

    def document(self) -> dict[str, Any]:
        """Return the JSON of the `result` event."""
        return {"tensors": self.tensors, "bytes": self.bytes, "sha256": self.sha256}

    def metrics(self) -> dict[str, float]:
        """Map names to values of what is logged as a metric."""
        return {
            "weights_verified_tensors": self.tensors,
            "weights_verified_bytes": self.bytes,
            "verify_s": self.seconds,
            **({"rounding_s": self.rounding_s} if self.rounding_s else {}),
        }


@dataclass(frozen=True, kw_only=True)
class Samples:
    """Values of each tensor as it was read: parameter name -> elements at `windows`."""

    ranks: int
    part: int | None = None
    """The rank whose partition alone was read here, and is looked at; None: all were."""
    values: dict[str, torch.Tensor] = field(default_factory=dict)

    def note(self, name: str, tensor: torch.Tensor) -> None:
        """Keep the elements of a tensor that is about to be written into the model."""
        self.values[name] = self.pick(tensor).clone()

    def pick(self, tensor: torch.Tensor) -> torch.Tensor:
        """Return the elements that are compared, one window after the other."""
        return pick(tensor, self.ranks, self.part)


def windows(numel: int, parts: int, part: int | None = None) -> list[tuple[int, int]]:
    """Return where a tensor is compared: at the begin, middle and end of each rank's partition.

    ZeRO-3 cuts the flat tensor into `parts` equal pieces.

    Args:
        part: the only piece that is wanted; None: all.
    """
    if part is not None:
        each = -(-numel // parts)
        first, last = min(numel, part * each), min(numel, (part + 1) * each)
        clipped = [(max(start, first), min(stop, last)) for start, stop in windows(numel, parts)]
        return [(start, stop) for start, stop in clipped if start < stop]
    if numel <= WHOLE_NUMEL:
        return [(0, numel)]
    each = -(-numel // parts)
    places = set()
    for part in range(parts):
        first, last = part * each, min((part + 1) * each, numel)
        middle = (first + last) // 2
        for start in (first, middle, last - WINDOW_NUMEL):
            start = min(max(start, first), numel - WINDOW_NUMEL)
            places.add((start, start + WINDOW_NUMEL))
    return sorted(places)


def pick(tensor: torch.Tensor, parts: int, part: int | None = None) -> torch.Tensor:
    """Return the elements of all windows, one after the other."""
    flat = tensor.detach().reshape(-1)
    found = [flat[start:stop] for start, stop in windows(flat.numel(), parts, part)]
    return torch.cat(found) if found else flat[:0]


@contextmanager
def sampled(ranks: int, noted: Callable[[], object] = nullcontext) -> Iterator[Samples]:
    """Take samples of everything that a module loads from a state dict in this block.

    transformers fills ZeRO-3 models through `Module._load_from_state_dict`, on rank 0 alone.

    Args:
        noted: called after each tensor.
    """
    samples = Samples(ranks=ranks)
    original = torch.nn.Module._load_from_state_dict

    def noting(module: torch.nn.Module, state: dict[str, Any], prefix: str, *rest: Any) -> None:
        for name, _ in module.named_parameters(recurse=False):
            if prefix + name in state:
                samples.note(prefix + name, state[prefix + name])
                noted()
        original(module, state, prefix, *rest)

    torch.nn.Module._load_from_state_dict = noting
    try:
        yield samples
    finally:
        torch.nn.Module._load_from_state_dict = original


def whole(parameter: torch.nn.Parameter) -> AbstractContextManager[Any]:
    """Gather nothing: the parameter is whole already."""
    return nullcontext()


def weight_faults(
    model: torch.nn.Module,
    events: EventLog,
    *,
    samples: Samples | None = None,
    gather: Gather = whole,
) -> list[str]:
    """Look at every parameter and persistent buffer once, and return what is wrong with them.

    Args:
        samples: of the checkpoint; None where transformers itself reported what it loaded.
        gather: makes a partitioned parameter whole for a block; called by all ranks in one order.
    """
    names = _names_of_parameters(model)
    numel = [_numel(parameter) for parameter in names]
    total, done, reported_s = sum(numel), 0, time.monotonic()
    not_numbers: list[str] = []
    lost: list[str] = []
    never: list[str] = []
    for (parameter, aliases), size in zip(names.items(), numel, strict=True):
        with gather(parameter), torch.no_grad():
            if not is_finite(_numbers(parameter)):
                not_numbers.append(aliases[0])
            elif samples is not None:
                read = [samples.values[name] for name in aliases if name in samples.values]
                if not read:
                    never.append(aliases[0])
                elif not any(_agrees(samples.pick(parameter.data), values) for values in read):
                    lost.append(aliases[0])
        done += size
        if (now_s := time.monotonic()) - reported_s >= REPORT_S or done == total:
            reported_s = now_s
            events.progress(done, total, "weights")
    not_numbers += [name for name, buffer in persistent_buffers(model) if not is_finite(buffer)]
    return [
        f"{len(found)} tensors {what} ({first_names(found)})"
        for found, what in (
            (not_numbers, "hold NaN or infinity"),
            (never, "were never read from the checkpoint and are random"),
            (lost, "do not hold the checkpoint's values"),
        )
        if found
    ]


def counted(model: torch.nn.Module) -> tuple[int, int]:
    """Return how many tensors were looked at and their bytes, tied ones once."""
    tensors = [(_numel(each), each.element_size()) for each in _names_of_parameters(model)]
    tensors += [(each.numel(), each.element_size()) for _, each in persistent_buffers(model)]
    return len(tensors), sum(numel * size for numel, size in tensors)


def is_finite(tensor: torch.Tensor) -> bool:
    """Tell whether a tensor holds neither NaN nor infinity, in one pass over it.

    A sum is finite only if all terms are; where it is not, because it overflowed, look closer.
    """
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    if bool(torch.isfinite(tensor.sum(dtype=torch.float32))):
        return True
    return bool(torch.isfinite(tensor).all())


def persistent_buffers(model: torch.nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the buffers that belong into a checkpoint, each once."""
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        for name, buffer in module.named_buffers(prefix=prefix, recurse=False):
            own = name.rpartition(".")[2]
            if own not in module._non_persistent_buffers_set and id(buffer) not in seen:
                seen.add(id(buffer))
                yield name, buffer


def _names_of_parameters(model: torch.nn.Module) -> dict[torch.nn.Parameter, list[str]]:
    """Return parameter -> its names; a tied one has several."""
    names: dict[torch.nn.Parameter, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, []).append(name)
    return names


def _numel(parameter: torch.nn.Parameter) -> int:
    """Return the elements of the whole parameter, also while it is partitioned."""
    return int(getattr(parameter, "ds_numel", parameter.numel()))


def _agrees(mine: torch.Tensor, read: torch.Tensor) -> bool:
    """Compare what the model holds with what was read, in the model's dtype."""
    if mine.numel() != read.numel():
        return False
    wanted = read.to(device=mine.device, dtype=mine.dtype)
    return torch.equal(mine, wanted) or torch.equal(_bits(mine), _bits(wanted))


def _bits(values: torch.Tensor) -> torch.Tensor:
    """View values as bytes: in packed weights any bit pattern may be, also one of NaN."""
    return values.contiguous().view(torch.uint8)


def _numbers(parameter: torch.nn.Parameter) -> torch.Tensor:
    """Return what must be finite: all of it, or the scales of a packed weight."""
    found: Callable[[torch.Tensor], torch.Tensor] | None
    found = getattr(parameter, "zinfer_numbers", None)
    return parameter.data if found is None else found(parameter.data)
