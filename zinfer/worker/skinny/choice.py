"""Choose what multiplies a few rows with each unpacked linear layer of a run.

All ranks measure at once, as they compute at once, and decide by the slowest rank: so they choose
the same. The choice is kept in the cache folder. The next run of the same products on this machine
takes it again, so its sums are rounded alike.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from zinfer.config import ConfigError, RunConfig
from zinfer.model.spec import ModelSpec
from zinfer.plan.own_products import MOST_ROWS, SIXTEEN_BITS, Shape, linear_shapes, own_rows
from zinfer.worker.quantised import native
from zinfer.worker.skinny.kept import keep_trials, kept_trials, situation
from zinfer.worker.skinny.trial import Trial, trials

Shared = Callable[[Any], list[Any]]
"""Hands a value to all ranks, and returns those of all, in their order."""


@dataclass(frozen=True, kw_only=True)
class LinearChoice:
    """The shapes of linear layers that our kernel multiplies, and why."""

    own: frozenset[Shape] = frozenset()
    rows: int
    """Up to so many rows; PyTorch multiplies more."""
    kernel: Literal["compiled", "torch", "mixed"]
    why: str
    trials: tuple[Trial, ...] = ()
    """Empty where nothing was measured."""
    seconds: float = 0.0
    """Time that choosing took."""

    def sentence(self, layers: int) -> str:
        """Say it of a model so many of whose layers multiply by our kernel."""
        return f"a few rows: {layers} linear layers multiply by zinfer's kernel ({self.why})"

    def document(self) -> dict[str, Any]:
        """Return it as JSON values."""
        return {
            "kernel": self.kernel,
            "why": self.why,
            "rows": self.rows,
            "trials": [each.document() for each in self.trials],
        }


def linear_choice(
    config: RunConfig, spec: ModelSpec, *, on_cpu: bool, share: Shared
) -> LinearChoice | None:
    """Choose for this run. Every rank must call it. None: there is no choice to make.

    Raises:
        ConfigError: dtype.kernel=compiled, and the kernel cannot multiply these weights.
    """
    started_s = time.perf_counter()
    must_be_ours = config.dtype.kernel == "compiled" and config.dtype.bits is None
    shapes = linear_shapes(spec, config)
    if (reason := _unsuited(spec, on_cpu=on_cpu)) is not None and must_be_ours:
        raise _no_kernel(reason)
    if reason is not None or not config.chooses_products or not shapes:
        return None
    rows = own_rows(config, spec.dtype)
    if rows == 0:
        set_so = config.dtype.kernel != "auto"
        too_many = f"a decode step has more than {MOST_ROWS} rows"
        why = f"dtype.kernel={config.dtype.kernel}" if set_so else too_many
        return LinearChoice(rows=0, kernel="torch", why=why)
    lacking = [reason for reason in share(_lacking()) if reason is not None]
    if lacking and must_be_ours:
        raise _no_kernel(lacking[0])
    if lacking:
        return LinearChoice(rows=0, kernel="torch", why=lacking[0])
    if config.dtype.kernel == "compiled":
        why = "dtype.kernel=compiled"
        return LinearChoice(own=frozenset(shapes), rows=rows, kernel="compiled", why=why)
    found, when = measured(shapes, rows, getattr(torch, spec.dtype), share)
    own = frozenset(each.shape for each in found if each.takes_ours)
    return LinearChoice(
        own=own,
        rows=rows,
        kernel="mixed" if 0 < len(own) < len(shapes) else "compiled" if own else "torch",
        why=f"with {rows} rows, {when}",
        trials=tuple(found),
        seconds=time.perf_counter() - started_s,
    )


def _unsuited(spec: ModelSpec, *, on_cpu: bool) -> str | None:
    """Say why our kernel cannot multiply this model's weights; None: it can."""
    if not on_cpu:
        return "the compiled kernel runs on the processor, and the model is on a GPU"
    if spec.dtype not in SIXTEEN_BITS:
        return f"{spec.name} computes in {spec.dtype}, and the compiled kernel in 16 bits"
    return None


def _lacking() -> str | None:
    """Say why this rank has no compiled kernel; None: it has."""
    reason = native.library()
    return reason if isinstance(reason, str) else None


def _no_kernel(reason: str) -> ConfigError:
    return ConfigError([f"dtype.kernel=compiled: {reason}. Set dtype.kernel=auto"])


def measured(
    shapes: Mapping[Shape, int], rows: int, dtype: torch.dtype, share: Shared
) -> tuple[list[Trial], str]:
    """Return rank 0's earlier measurement, else measure now. Says which."""
    key = situation(shapes, rows, dtype, ranks=len(share(None)))
    kept: list[Trial] | None = share(kept_trials(key))[0]
    if kept is not None:
        return kept, "measured by an earlier run"
    share(None)  # all ranks begin at once
    found = slowest(share(trials(shapes, rows, dtype)))
    if not all(each.is_calm for each in found):
        return found, "measured before the run, on a busy machine"
    keep_trials(key, found)
    return found, "measured before the run"


def slowest(by_rank: Sequence[Sequence[Trial]]) -> list[Trial]:
    """Return, for each shape and way, the time of the slowest rank."""
    return [
        Trial(
            out=each[0].out,
            inputs=each[0].inputs,
            own_s=max(trial.own_s for trial in each),
            torch_s=max(trial.torch_s for trial in each),
            is_calm=all(trial.is_calm for trial in each),
        )
        for each in zip(*by_rank, strict=True)
    ]
