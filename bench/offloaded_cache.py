"""Generate with transformers' own offloaded cache, as bench_kv.py compares it.

    python bench/offloaded_cache.py OVERRIDE...

Takes the words that zinfer takes, with engine=resident. Prints one JSON line: decode_tokens_per_s
and prefill_s, or the reason why this cache does not run here.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache

import zinfer
from zinfer.job.events import EventLog
from zinfer.model.spec import model_spec
from zinfer.worker.engines import resident
from zinfer.worker.generate import generate_timed
from zinfer.worker.kv_cache.session import KvSession


class Offloaded(KvSession):
    """Gives every generation an offloaded cache of transformers."""

    def __init__(self, model_config: Any) -> None:
        super().__init__()
        self._model_config = model_config

    def arguments(self) -> dict[str, Any]:
        """Return what `generate` needs, with an empty cache."""
        return {"past_key_values": DynamicCache(config=self._model_config, offloading=True)}

    def held_bytes(self) -> int | None:
        """Return 0: this comparison does not count bytes."""
        return 0


def measured(overrides: list[str]) -> dict[str, float]:
    """Build the model, generate once, and return the two numbers."""
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1")
    config = zinfer.compose(overrides=overrides)
    spec = model_spec(config.model, compute_dtype=config.dtype.compute)
    with tempfile.TemporaryDirectory() as folder:
        events = EventLog(Path(folder))
        engine = resident.load(config, spec, {}, events)
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch.batch_size, config.batch.prompt_tokens)
        prompts = torch.randint(4, spec.vocab_size, shape, generator=generator)
        done = generate_timed(engine, prompts, config.batch, events, Offloaded(engine.model.config))
    sample = done.samples[-1]
    step_s = statistics.median(sample.decode_step_s)
    return {
        "decode_tokens_per_s": config.batch.batch_size / step_s,
        "prefill_s": sample.prefill_s,
    }


if __name__ == "__main__":
    try:
        print(json.dumps(measured(sys.argv[1:])))
    except (AssertionError, RuntimeError, AttributeError) as error:
        print(json.dumps({"reason": f"{type(error).__name__}: {error}"}))
