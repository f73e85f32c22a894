"""Score a run: what a KV placement, KV bits or quantised weights cost in quality.

The model reads a fixed text and says, token by token, what it expects next; whatever it says, the
text's own token is fed to it (teacher forcing). So one early difference does not spoil all that
follows, as it does when two models generate freely. The first half of each piece of the text is
prefilled; the second half is decoded through the run's own KV cache, and only these predictions
count: KV bits act there. The reference is the same weights unquantised with kv_cache=device.
"""

from __future__ import annotations

import hashlib
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors import SafetensorError
from transformers import LogitsProcessor, LogitsProcessorList

from zinfer.config import ConfigError, QualityConfig, RunConfig
from zinfer.job.events import EventLog
from zinfer.job.quality import Quality, ReferenceFrom
from zinfer.model.tokenizer import find_tokenizer, require_embedded
from zinfer.model.weights.local import local_folder
from zinfer.paths import PACKAGE, cache_dir
from zinfer.plan.fit import shortfall
from zinfer.plan.planned import Planned, plan_run
from zinfer.plan.problems import has_position_table
from zinfer.worker.engines import Engine
from zinfer.worker.generate import fix_lengths
from zinfer.worker.kv_cache.session import KvSession, kv_session
from zinfer.worker.quality_scores import (
    Scores,
    divergence,
    joined,
    read_scores,
    scores_of,
    write_scores,
)
from zinfer.worker.skinny.modules import own_products_up_to

TEXT_FILE = PACKAGE / "data" / "quality_text.txt"
ROWS = 8
"""Pieces of the text that are scored side by side."""
PROGRESS_S = 1.0


@dataclass(frozen=True, kw_only=True)
class Pieces:
    """The text as token ids [ROWS, tokens]."""

    ids: torch.Tensor
    prefilled: int
    """Tokens of each row that come before the first decode step."""

    @property
    def new_tokens(self) -> int:
        """Tokens of each row that the model is made to say; all but the first are scored."""
        return self.ids.shape[1] - self.prefilled

    def planned(self, planned: Planned, **settings: Any) -> Planned:
        """Plan the same run for this text. Every rank reads all rows."""
        config = planned.config
        ranks = config.launcher.ranks * config.launcher.nodes
        changed = config.changed(
            batch={
                "batch_size": ROWS * ranks,
                "prompt_tokens": self.prefilled,
                "new_tokens": self.new_tokens,
            },
            **settings,
        )
        return plan_run(changed, planned.hardware, planned.spec)


QUICK_NUMEL = 2_000_000_000
"""Parameters up to which quality.enabled=auto scores a run."""
NVME_TIMES = 4
"""On NVMe so many times fewer: each of the text's tokens reads all weights from the disk."""


class NoReference(ConfigError):
    """No unquantised run of the same weights has left its scores."""


def is_quickly_scored(planned: Planned, events: EventLog) -> bool:
    """Tell if scoring takes little time beside the run, and say why where it does not."""
    numel = planned.spec.num_active_parameters or planned.spec.num_parameters
    times = NVME_TIMES if planned.config.offload.device == "nvme" else 1
    if numel * times <= QUICK_NUMEL:
        return True
    if events.rank == 0:
        events.write(
            "note",
            message=f"not scored: {numel:,} parameters take long. Set quality.enabled=true",
        )
    return False


def pieces_to_score(planned: Planned) -> Pieces:
    """Tokenise the text, before anything is loaded.

    Raises:
        ConfigError: no tokenizer, one of another model, a text that is too short, or memory that
            does not hold it.
    """
    config, spec = planned.config, planned.spec
    tokenizer, reason = find_tokenizer(config.model, local_folder(config.model))
    if tokenizer is None:
        raise ConfigError([f"quality.enabled=true: {reason}. Set quality.enabled=false"])
    most = spec.max_positions if has_position_table(spec) else None
    pieces = cut(tokenizer, config.quality.tokens, most)
    scored_ids = pieces.ids.flatten().tolist()
    require_embedded(scored_ids, spec.vocab_size, tokenizer, "quality.enabled=false")
    for asked in (pieces.planned(planned), pieces.planned(planned, kv_cache=ON_DEVICE)):
        if planned.fits and not asked.fits and config.plan.enforce:
            raise ConfigError(
                [
                    f"scoring {ROWS} rows of {pieces.ids.shape[1]} tokens does not fit: "
                    f"{shortfall(asked)}. Set a smaller quality.tokens, or quality.enabled=false"
                ]
            )
    return pieces


ON_DEVICE: dict[str, Any] = {
    "placement": "device",
    "bits": 16,
    "key_bits": None,
    "value_bits": None,
    "device_layers": 0,
    "pin_memory": None,
    "kernel": "auto",
}
"""Settings of the reference's KV cache."""


def cut(tokenizer: Any, tokens: int, most: int | None = None) -> Pieces:
    """Cut the text into ROWS pieces of equal length.

    Each begins with the token that the tokenizer puts before a text, where it does so: some models
    read nothing sensibly without it.

    Args:
        tokens: how many of the text are used, over all rows.
        most: positions that the model has; None: no end.

    Raises:
        ConfigError: the text has fewer tokens.
    """
    text = TEXT_FILE.read_text(encoding="utf-8")
    ids: list[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    with_special = tokenizer("a")["input_ids"]
    begin = [tokenizer.bos_token_id] if with_special[0] == tokenizer.bos_token_id else []
    if len(ids) < tokens:
        raise ConfigError(
            [f"quality.tokens={tokens}: the text has {len(ids)}. Set quality.tokens={len(ids)}"]
        )
    length = tokens // ROWS
    if most is not None:
        length = min(length, most - len(begin))
    rows = [begin + ids[row * length : (row + 1) * length] for row in range(ROWS)]
    return Pieces(ids=torch.tensor(rows), prefilled=len(rows[0]) // 2)


class Teacher(LogitsProcessor):
    """Notes what the model expects at each step, and makes it say the text's token instead."""

    def __init__(self, pieces: Pieces, reference: Scores | None, events: EventLog) -> None:
        self._targets = pieces.ids[:, pieces.prefilled :]
        self._reference = reference
        self._events = events
        self._said_s = time.perf_counter()
        self._step = 0
        self.scores: list[Scores] = []

    def __call__(self, input_ids: torch.Tensor, logits: torch.Tensor) -> torch.Tensor:
        target = self._targets[:, self._step]
        if self._step > 0:  # the first comes from the prefill
            kept = None if self._reference is None else self._reference.ids[:, self._step - 1]
            self.scores.append(scores_of(logits, target, kept))
        self._step += 1
        if time.perf_counter() - self._said_s >= PROGRESS_S:
            self._said_s = time.perf_counter()
            self._events.progress(self._step, self._targets.shape[1], "tokens")
        forced = torch.full_like(logits, -torch.inf)
        return forced.scatter_(1, target[:, None].to(logits.device), 0.0)


def read_text(
    engine: Engine,
    pieces: Pieces,
    config: RunConfig,
    kv: KvSession,
    events: EventLog,
    reference: Scores | None = None,
) -> Scores:
    """Let the model read the pieces through this KV cache; every rank must call it.

    Args:
        config: with the lengths of the pieces as its batch.
        reference: tokens whose probabilities are kept; None: the model's own likeliest.
    """
    fix_lengths(engine.model, config.batch, engine.tokenizer)
    teacher = Teacher(pieces, reference, events)
    begin = pieces.ids[:, : pieces.prefilled].to(engine.device)
    with torch.no_grad():
        said = engine.model.generate(
            input_ids=begin,
            attention_mask=torch.ones_like(begin),
            logits_processor=LogitsProcessorList([teacher]),
            **kv.arguments(),
        )
    assert torch.equal(said.cpu(), pieces.ids), "generate did not say the text's own tokens"
    return joined(teacher.scores)


def score(planned: Planned, engine: Engine, pieces: Pieces, events: EventLog) -> Quality:
    """Score the run against its reference, which is made and kept where none is. All ranks call it.

    Raises:
        NoReference: the weights are quantised, and no unquantised run has left one.
    """
    events.phase("quality")
    started_s = time.perf_counter()
    scoring = pieces.planned(planned)
    plain = pieces.planned(planned, kv_cache=ON_DEVICE)
    path, key = kept_in(planned, engine, pieces)
    reference = read_scores(path, (ROWS, pieces.new_tokens - 1)) if path else None
    is_missing = _of_first_rank(reference is None, engine.ranks)
    if is_missing:
        if planned.config.dtype.bits is not None:
            raise NoReference([no_reference(planned.spec.dtype)])
        with own_products_up_to(0, engine.model):
            reference = read_text(engine, pieces, plain.config, KvSession(), events)
        if path and events.rank == 0:
            keep_scores(path, reference, key, events)
    has_own_products = engine.linear is not None and bool(engine.linear.own)
    if is_missing and not planned.config.kv_cache.is_offloaded and not has_own_products:
        mine = reference
    else:
        with (
            own_products_up_to(ROWS, engine.model),
            kv_session(engine.model, scoring, events) as kv,
        ):
            mine = read_text(engine, pieces, scoring.config, kv, events, reference)
    assert mine is not None
    if reference is None:
        reference = mine  # another host's cache folder has it; rank 0's numbers count
    quality = compared(reference, mine, planned.config.quality)
    how: ReferenceFrom = "this run" if mine is reference else "made" if is_missing else "kept"
    return replace(quality, seconds=time.perf_counter() - started_s, reference=how)


def require_reference(planned: Planned, engine: Engine, pieces: Pieces) -> None:
    """Refuse, before anything is timed, quantised weights that have no reference. All ranks ask.

    Raises:
        NoReference: no unquantised run of these weights has left one.
    """
    if planned.config.dtype.bits is None:
        return
    path, _ = kept_in(planned, engine, pieces)
    kept = read_scores(path, (ROWS, pieces.new_tokens - 1)) if path else None
    if _of_first_rank(kept is None, engine.ranks):
        raise NoReference([no_reference(planned.spec.dtype)])


def keep_scores(path: Path, scores: Scores, key: dict[str, object], events: EventLog) -> None:
    """Write the reference for the runs to come; this one has ended well even where that fails."""
    try:
        write_scores(path, scores, key)
    except (OSError, SafetensorError) as error:
        events.warning(
            f"the scores of the unquantised model cannot be kept in {path.parent}: {error}. "
            "Set the environment variable ZINFER_CACHE to a folder that can be written"
        )


def no_reference(dtype: str) -> str:
    """Say what a run with quantised weights lacks before it can be scored."""
    return (
        "quality.enabled=true: no unquantised run of these weights has left its scores yet. "
        f"Set dtype={dtype} once and leave the rest as it is, or quality.enabled=false"
    )


def compared(reference: Scores, mine: Scores, limits: QualityConfig) -> Quality:
    """Compare the predictions of both, and hold them against the limits."""
    agreement = float((mine.likeliest == reference.likeliest).double().mean())
    loss = mine.loss.double().mean()
    ratio = float((loss - reference.loss.double().mean()).exp())
    reasons = []
    if not agreement >= limits.min_agreement:
        reasons.append(
            f"{agreement:.3f} of the tokens agree with the unquantised model, "
            f"quality.min_agreement is {limits.min_agreement}"
        )
    if not ratio <= limits.max_perplexity_ratio:
        reasons.append(
            f"the perplexity is {ratio:.3f} times the unquantised model's, "
            f"quality.max_perplexity_ratio is {limits.max_perplexity_ratio}"
        )
    return Quality(
        verdict="beyond_limits" if reasons else "ok",
        reasons=tuple(reasons),
        token_agreement=agreement,
        kl_divergence=divergence(reference, mine),
        perplexity=float(loss.exp()),
        perplexity_ratio=ratio,
        scored_tokens=mine.loss.numel(),
        seconds=0.0,
        reference="kept",
    )


def kept_in(
    planned: Planned, engine: Engine, pieces: Pieces
) -> tuple[Path | None, dict[str, object]]:
    """Return the file of the reference's scores, and what they depend on.

    None: the weights have no fingerprint, so nothing is kept.
    """
    verified = engine.verified
    key: dict[str, object] = {
        "weights": verified.fingerprint if verified else None,
        "dtype": planned.spec.dtype,
        "device": engine.device.type,
        "text": hashlib.sha256(pieces.ids.numpy().tobytes()).hexdigest(),
        "shape": [*pieces.ids.shape, pieces.prefilled],
        "torch": str(torch.__version__),
        "transformers": str(transformers.__version__),
    }
    if key["weights"] is None:
        return None, key
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:32]
    return cache_dir() / "quality" / f"{name}.safetensors", key


def _of_first_rank(answer: bool, ranks: int) -> bool:
    """Return rank 0's answer on every rank: all must read the text equally often."""
    if ranks == 1:
        return answer
    shared = [answer]
    torch.distributed.broadcast_object_list(shared, src=0)
    return shared[0]
