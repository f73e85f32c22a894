"""Read a short text of random tokens with a model, as a run that scores itself does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from tests.helpers.composing import composed
from tests.helpers.tiny_models import VOCAB
from zinfer.job.events import EventLog
from zinfer.worker.engines import Engine
from zinfer.worker.kv_cache.session import KvSession, host_cache
from zinfer.worker.quality import ROWS, Pieces, read_text
from zinfer.worker.quality_scores import Scores

PREFILLED, NEW = 9, 12


def pieces() -> Pieces:
    """Make a text of random tokens for tiny models."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(2, VOCAB, (ROWS, PREFILLED + NEW), generator=generator)
    return Pieces(ids=ids, prefilled=PREFILLED)


def read(tmp_path: Path, model: Any, *overrides: str, reference: Scores | None = None) -> Scores:
    """Read the pieces with this model and the KV cache that the overrides choose."""
    text = pieces()
    config = composed("model=tiny-llama", *overrides).changed(
        batch={"batch_size": ROWS, "prompt_tokens": PREFILLED, "new_tokens": NEW}
    )
    engine = Engine(
        model=model,
        tokenizer=None,
        device=torch.device("cpu"),
        rank=0,
        ranks=1,
        weight_stored_bytes=0,
    )
    events = EventLog(tmp_path, 0, "a")
    if not config.kv_cache.is_offloaded:
        return read_text(engine, text, config, KvSession(), events, reference)
    from zinfer.worker.kv_cache.routes import attached

    cache = host_cache(model, config, on_gpu=False)
    with attached(model, cache):
        return read_text(engine, text, config, KvSession(cache), events, reference)
