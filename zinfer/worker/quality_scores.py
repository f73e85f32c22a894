"""Score each token of a text by a model, small enough to keep for every model and text."""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

TOP = 256
"""Tokens whose probabilities are kept for each prediction; all others count as one token.

The divergence over such a coarser set never exceeds the whole one, and is 0 for equal models.
"""
KEY, CHECKSUM = "key", "sha256"
"""Entries of the file's header: what the scores depend on, and the hash of their bytes."""


@dataclass(frozen=True, kw_only=True)
class Scores:
    """Predictions of a text's tokens [rows, steps], on the host.

    Attributes:
        likeliest: id of the token with the highest logit.
        loss: negative log-likelihood of the text's own token, in nats.
        ids: [rows, steps, TOP] the reference's likeliest tokens.
        log_probs: [rows, steps, TOP] of these.
        rest: log-probability of all other tokens together.
    """

    likeliest: torch.Tensor
    loss: torch.Tensor
    ids: torch.Tensor
    log_probs: torch.Tensor
    rest: torch.Tensor


def scores_of(
    logits: torch.Tensor, target: torch.Tensor, ids: torch.Tensor | None = None
) -> Scores:
    """Score one step of every row.

    Args:
        logits: [rows, vocabulary].
        target: [rows] the text's own next tokens.
        ids: [rows, TOP] tokens to keep; None: the likeliest of these logits.
    """
    log_probs = logits.float().log_softmax(-1)
    if ids is None:
        ids = log_probs.topk(min(TOP, log_probs.shape[-1] - 1), -1).indices
    ids, target = ids.to(logits.device), target.to(logits.device)
    rest = log_probs.scatter(1, ids, -torch.inf).logsumexp(-1)
    return Scores(
        likeliest=log_probs.argmax(-1).cpu(),
        loss=-log_probs.gather(1, target[:, None])[:, 0].cpu(),
        ids=ids.cpu(),
        log_probs=log_probs.gather(1, ids).cpu(),
        rest=rest.cpu(),
    )


def joined(steps: list[Scores]) -> Scores:
    """Put the scores of single steps [rows] together to [rows, steps]."""
    return Scores(
        **{
            item.name: torch.stack([getattr(step, item.name) for step in steps], 1)
            for item in fields(Scores)
        }
    )


def divergence(reference: Scores, mine: Scores) -> float:
    """Return the mean Kullback-Leibler divergence of `mine` from the reference, in nats.

    Source: Kullback and Leibler 1951, On Information and Sufficiency.
    """
    assert torch.equal(reference.ids, mine.ids), "both are over the reference's tokens"
    theirs = torch.cat([reference.log_probs, reference.rest[..., None]], -1).double()
    ours = torch.cat([mine.log_probs, mine.rest[..., None]], -1).double()
    terms = torch.where(theirs == -torch.inf, 0.0, theirs.exp() * (theirs - ours))
    return max(0.0, float(terms.sum(-1).mean()))  # below 0 by rounding only


def write_scores(path: Path, scores: Scores, key: dict[str, object]) -> None:
    """Write a file whole or not at all; jobs that run side by side may write the same one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=".scores-") as folder:
        tensors = {item.name: getattr(scores, item.name).contiguous() for item in fields(Scores)}
        header = {KEY: json.dumps(key), CHECKSUM: _sha256(scores)}
        save_file(tensors, Path(folder) / path.name, header)
        os.replace(Path(folder) / path.name, path)


def read_scores(path: Path, shape: tuple[int, int]) -> Scores | None:
    """Read kept scores of this shape [rows, steps]; None where there are none, or broken ones."""
    try:
        with safe_open(path, "pt") as file:
            scores = Scores(**{item.name: file.get_tensor(item.name) for item in fields(Scores)})
            checksum = (file.metadata() or {}).get(CHECKSUM)
    except (OSError, SafetensorError):
        return None
    is_whole = scores.loss.shape == shape and checksum == _sha256(scores)
    return scores if is_whole else None


def _sha256(scores: Scores) -> str:
    digest = hashlib.sha256()
    for item in fields(Scores):
        digest.update(memoryview(getattr(scores, item.name).contiguous().numpy()).cast("B"))
    return digest.hexdigest()
