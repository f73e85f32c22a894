"""Engines: each module has `load(config, spec, deepspeed_json, events) -> Engine`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from zinfer.config import RunConfig
from zinfer.job.events import EventLog
from zinfer.model.tokenizer import find_tokenizer
from zinfer.model.weights.local import local_folder

if TYPE_CHECKING:
    import torch

    from zinfer.model.weights.verified import VerifiedWeights
    from zinfer.worker.quantised.choice import PackedChoice
    from zinfer.worker.skinny.choice import LinearChoice


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Weights in their tier, ready to generate. One per rank."""

    model: Any
    """An unmodified transformers causal language model."""
    tokenizer: Any | None
    device: torch.device
    rank: int
    ranks: int
    weight_stored_bytes: int
    """Tensors that hold this rank's weights, wherever they are; tied weights once."""
    verified: VerifiedWeights | None = None
    """The proof that all weights came from the checkpoint; None for dummy weights."""

    linear: LinearChoice | None = None
    """What multiplies a few rows with 16-bit weights; None: PyTorch, without a choice."""
    packed: PackedChoice | None = None
    """What multiplies packed weights; None: there are none of ours."""
    gathered_bytes: Callable[[], int] | None = None
    """Returns the bytes of weights that were gathered for use so far; None: they never leave."""

    @property
    def threads(self) -> int:
        """Threads of this rank that compute, or that keep its GPU busy."""
        if self.device.type != "cpu":
            return 1
        import torch

        return int(torch.get_num_threads())


def tokenizer_for(config: RunConfig, events: EventLog) -> Any | None:
    """Load the model's tokenizer. None where nothing is read or shown as text, or there is none.

    The latter is said in a warning.
    """
    if config.weights == "dummy" and config.batch.prompt == "synthetic":
        return None
    tokenizer, reason = find_tokenizer(config.model, local_folder(config.model))
    if tokenizer is None:
        events.warning(f"prompts and output are token ids only: {reason}")
    return tokenizer
