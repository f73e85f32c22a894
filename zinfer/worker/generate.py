"""Warm up, then time generations. Every sample is kept.

A timestamp is taken only when the device has finished everything that was queued before it. The
model's own `generate` runs, greedy, with fixed lengths: what a user of transformers gets is timed.
"""

from __future__ import annotations

import time
from dataclasses import asdict
from typing import Any, Literal

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList

from zinfer.config import BatchConfig
from zinfer.job.events import EventLog
from zinfer.worker.cache_bytes import remembered_bytes
from zinfer.worker.energy import Meter
from zinfer.worker.engines import Engine
from zinfer.worker.kv_cache.session import KvSession
from zinfer.worker.samples import Generation, Sample
from zinfer.worker.stability import relative_error
from zinfer.worker.surroundings import between, look
from zinfer.worker.yardstick import Yardstick

PROGRESS_S = 1.0


def now_s(device: torch.device) -> float:
    """Return seconds, once everything queued on the device before this call is done."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


class StepClock(StoppingCriteria):
    """Note the time after each new token; generate asks it whether to stop, and it never does.

    It reports progress at most once a second: one short line, tens of microseconds.
    """

    def __init__(
        self, device: torch.device, events: EventLog, kv: KvSession, *, before: int, total: int
    ) -> None:
        """Begin a generation.

        Args:
            before: tokens of each row in the phase's earlier generations.
            total: tokens of each row in all generations of the phase.
        """
        self._device = device
        self._kv = kv
        self._before, self._total = before, total
        self._events = events
        self._said_s = now_s(device)
        self.times_s: list[float] = []

    def __call__(
        self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any
    ) -> torch.Tensor:
        time_s = now_s(self._device)
        self.times_s.append(time_s)
        if len(self.times_s) == 1:
            self._kv.first_token_is_there()
        if time_s - self._said_s >= PROGRESS_S:
            self._said_s = time_s
            self._events.progress(self._before + len(self.times_s), self._total, "tokens")
        return torch.zeros(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)


def generate_timed(
    engine: Engine, prompts: torch.Tensor, batch: BatchConfig, events: EventLog, kv: KvSession
) -> Generation:
    """Warm up, then time `batch.repeats` generations of this rank's rows.

    With `batch.max_repeats` the timing goes on until the median is known well enough.

    Args:
        prompts: token ids [batch_size, prompt_tokens] of all ranks' rows.
    """
    rows = batch.batch_size // engine.ranks
    mine = prompts[engine.rank * rows : (engine.rank + 1) * rows].to(engine.device)
    fix_lengths(engine.model, batch, engine.tokenizer)
    samples: list[Sample] = []
    if batch.warmup:
        events.phase("warm-up", generations=batch.warmup, new_tokens=batch.new_tokens)
    for index in range(batch.warmup):
        sample, ids, kv_bytes = _generate_once(engine, mine, batch, "warmup", index, events, kv)
        samples.append(_noted(sample, events))
    events.phase("generate", generations=batch.repeats, new_tokens=batch.new_tokens)
    yardstick, meter = Yardstick(), Meter(engine.device)
    before = look()
    gathered = engine.gathered_bytes
    gathered_before = gathered() if gathered else 0
    yardstick_s = [yardstick.seconds()]
    totals_s: list[float] = []
    while _goes_on(totals_s, batch, engine.ranks):
        index = len(totals_s)
        meter.start()
        sample, ids, kv_bytes = _generate_once(engine, mine, batch, "timed", index, events, kv)
        meter.stop()
        samples.append(_noted(sample, events))
        totals_s.append(sample.total_s)
        yardstick_s.append(yardstick.seconds())
    return Generation(
        surroundings=between(before, look(), engine.ranks),
        samples=tuple(samples),
        token_ids=tuple(tuple(row) for row in ids.tolist()),
        yardstick_s=tuple(yardstick_s),
        energy=meter.energy(),
        kv_cache_bytes=kv_bytes,
        kv_use=kv.use(batch.new_tokens - 1),
        streamed_bytes_per_step=(
            (gathered() - gathered_before) / (len(totals_s) * batch.new_tokens)
            if gathered
            else None
        ),
    )


def _goes_on(totals_s: list[float], batch: BatchConfig, ranks: int) -> bool:
    """Tell whether one more generation is timed. Rank 0 decides for all: times differ a little."""
    if len(totals_s) < batch.repeats:
        return True
    if batch.max_repeats is None or len(totals_s) >= batch.max_repeats:
        return False
    unknown = relative_error(totals_s) > batch.target_relative_error
    if ranks == 1:
        return unknown
    decision = [unknown]
    torch.distributed.broadcast_object_list(decision, src=0)
    return decision[0]


def _noted(sample: Sample, events: EventLog) -> Sample:
    events.write("sample", **asdict(sample))
    return sample


def fix_lengths(model: Any, batch: BatchConfig, tokenizer: Any | None) -> None:
    """Set greedy decoding of exactly new_tokens, end-of-sequence ignored.

    The checkpoint's own generation settings do not count.
    """
    padding = tokenizer.pad_token_id if tokenizer is not None else 0
    model.generation_config = GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=batch.new_tokens,
        pad_token_id=padding,
        eos_token_id=None,
    )


def _generate_once(
    engine: Engine,
    ids: torch.Tensor,
    batch: BatchConfig,
    kind: Literal["warmup", "timed"],
    index: int,
    events: EventLog,
    kv: KvSession,
) -> tuple[Sample, torch.Tensor, int | None]:
    planned = batch.warmup if kind == "warmup" else max(batch.repeats, index + 1)
    before, total = index * batch.new_tokens, planned * batch.new_tokens
    clock = StepClock(engine.device, events, kv, before=before, total=total)
    cache = kv.arguments()
    with torch.no_grad():
        start_s = now_s(engine.device)
        result = engine.model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            stopping_criteria=StoppingCriteriaList([clock]),
            return_dict_in_generate=True,
            **cache,
        )
    new_ids = result.sequences[:, ids.shape[1] :].cpu()
    assert new_ids.shape == (ids.shape[0], batch.new_tokens), (
        f"{tuple(new_ids.shape)} new tokens, not {batch.new_tokens} a row"
    )
    assert len(clock.times_s) == batch.new_tokens, (
        "generate asked its stopping criteria once for each token"
    )
    steps = zip(clock.times_s, clock.times_s[1:], strict=False)
    sample = Sample(
        kind=kind,
        index=index,
        prefill_s=clock.times_s[0] - start_s,
        decode_step_s=tuple(after - before for before, after in steps),
        total_s=clock.times_s[-1] - start_s,
    )
    held = kv.held_bytes()
    if held is None:
        held = remembered_bytes(engine.model, result.past_key_values, ids.shape[0])
    return sample, new_ids, held
