"""Load published weights from the hub or a local folder, all of them or not at all.

Under an alive HfDeepSpeedConfig transformers loads them partitioned.
"""

from __future__ import annotations

import time
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from zinfer.config import ConfigError, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.gguf_file import gguf_path
from zinfer.model.hf import check_pinned, load_checkpoint_config, model_class, read_config
from zinfer.model.weights.checkpoint import (
    INDEX,
    WHOLE,
    Checkpoint,
    WrongWeights,
    read_checkpoint,
    sampled_hash,
)
from zinfer.model.weights.demo_model import DEMO_MODEL
from zinfer.model.weights.local import local_folder
from zinfer.model.weights.reading import TensorCount, loading_reported
from zinfer.model.weights.rehearsal import Rehearsal, rehearse
from zinfer.model.weights.tied import require_equal
from zinfer.model.weights.verified import (
    Gather,
    Samples,
    VerifiedWeights,
    counted,
    sampled,
    weight_faults,
    whole,
)

if TYPE_CHECKING:
    from transformers import PretrainedConfig

QUANTISED_SETTINGS = ("quantization_config", "compression_config")
"""Entries of config.json that say how weights were quantised; the second one is of old files."""


@dataclass(frozen=True, kw_only=True)
class Opened:
    """A checkpoint that was found to be the model's; no weight was read yet."""

    model: ModelConfig
    source: str
    hf_config: PretrainedConfig
    checkpoint: Checkpoint | None
    """None for GGUF, whose tensors transformers unpacks itself."""
    rehearsal: Rehearsal
    seconds: float

    def fingerprint(self) -> str:
        """Hash samples of all files: fine-tuned weights have another one."""
        if self.checkpoint is not None:
            return self.checkpoint.fingerprint()
        path = gguf_path(self.model, self.source)
        return sampled_hash([path], f"{path.name} {path.stat().st_size}\n")


@dataclass(frozen=True, kw_only=True)
class Read:
    """A model with its published weights, and samples of what was read."""

    model: Any
    samples: Samples | None
    """None where transformers' own report was checked: it is complete without ZeRO-3."""
    rounding_s: float = 0.0
    """Time of searching codes that no run had searched before; not part of load_s."""


def weights_source(model: ModelConfig) -> str:
    """Return the folder or hub id of this model's weights."""
    source = model.source or local_folder(model) or model.hub_id
    assert source is not None, "config.problems refuses weights=pretrained without a source"
    return str(source)


def open_checkpoint(model: ModelConfig, dtype: torch.dtype, events: EventLog) -> Opened:
    """Read a checkpoint's headers and make sure that it is this model's. Reads no weight.

    Call it before an HfDeepSpeedConfig is alive: afterwards transformers builds partitioned models.

    Raises:
        ConfigError: not there, no network, only pickles, damaged, quantised, or another model's.
    """
    started_s = time.perf_counter()
    source = weights_source(model)
    try:
        raw = read_config(source, model)
        hf_config = load_checkpoint_config(model, local_folder(model))
    except (OSError, ValueError) as error:
        raise ConfigError([unreachable(model, source, error)]) from error
    for difference in check_pinned(model, hf_config):
        events.warning(f"{source} is not what conf/model/{model.name}.yaml pins: {difference}")
    checkpoint, rehearsal = None, Rehearsal(key_mapping={})
    if not model.gguf_file:
        _refuse_quantised(source, raw)
        checkpoint = read_checkpoint(_folder(model, source), allow_pickle=model.allow_pickle)
        rehearsal = rehearse(
            checkpoint,
            model_class(hf_config),
            hf_config,
            dtype,
            is_text_part=type(raw) is not type(hf_config),
        )
        require_equal(checkpoint, rehearsal.tied)
    for warning in rehearsal.warnings:
        events.warning(warning)
    return Opened(
        model=model,
        source=source,
        hf_config=hf_config,
        checkpoint=checkpoint,
        rehearsal=rehearsal,
        seconds=time.perf_counter() - started_s,
    )


def pretrained_model(
    opened: Opened, dtype: torch.dtype, events: EventLog, *, zero3_ranks: int | None = None
) -> Read:
    """Load the model with its published weights.

    Args:
        zero3_ranks: over how many ranks DeepSpeed partitions it; None: it is whole on this one.

    Raises:
        ConfigError: a file cannot be read.
        WrongWeights: transformers could not use some of the checkpoint.
    """
    model = opened.model
    mapping = dict(opened.rehearsal.key_mapping)
    tensors = opened.checkpoint.tensors if opened.checkpoint else {}
    count = TensorCount(events, len(tensors) - len(opened.rehearsal.unused))
    with (
        sampled(zero3_ranks, count.one_more) if zero3_ranks else nullcontext() as samples,
        loading_reported(events),
    ):
        try:
            built, info = model_class(opened.hf_config).from_pretrained(
                opened.source,
                config=opened.hf_config,
                dtype=dtype,
                use_safetensors=None if model.allow_pickle else True,
                trust_remote_code=model.trust_remote_code,
                output_loading_info=True,
                **({"key_mapping": mapping} if mapping else {}),
                **({"gguf_file": model.gguf_file} if model.gguf_file else {}),
            )
        except OSError as error:
            raise ConfigError([unreachable(model, opened.source, error)]) from error
    unused = set(opened.rehearsal.unused)
    wrong = sorted({*info["missing_keys"], *(set(info["unexpected_keys"]) - unused)})
    if wrong or info["mismatched_keys"] or info["error_msgs"]:
        raise WrongWeights(
            f"transformers did not load all of {opened.source}: {len(wrong)} tensors missing or "
            f"unknown ({', '.join(wrong[:3])}), {len(info['mismatched_keys'])} of another shape"
        )
    return Read(model=built, samples=samples)


def verify(
    opened: Opened, read: Read, events: EventLog, *, gather: Gather = whole, ranks: int = 1
) -> VerifiedWeights:
    """Make sure that the finished model holds the checkpoint's values. All ranks must call it.

    Raises:
        WrongWeights: names the first tensors of each fault, and their number.
    """
    events.phase("verify")
    started_s = time.perf_counter()
    samples = read.samples
    if events.rank != 0 and samples is not None and samples.part is None:
        samples = None  # the other ranks have read no value of the checkpoint
    faults = _of_all_ranks(weight_faults(read.model, events, samples=samples, gather=gather), ranks)
    if faults:
        raise WrongWeights(f"the weights of {opened.source} cannot be used: {'; '.join(faults)}")
    tensors, size = counted(read.model)
    return VerifiedWeights(
        tensors=tensors,
        bytes=size,
        sha256=opened.checkpoint.sha256 if opened.checkpoint else None,
        fingerprint=opened.fingerprint(),
        seconds=opened.seconds + time.perf_counter() - started_s,
        rounding_s=read.rounding_s,
    )


def unreachable(model: ModelConfig, source: str, error: Exception) -> str:
    """Return one sentence for a checkpoint that cannot be read."""
    said = " ".join(str(error).split()) or type(error).__name__
    make = (
        "Run `make demo-model` for a small real model"
        if model.name == DEMO_MODEL
        else "Set model=custom model.source=/path/to/a/folder"
    )
    return f"the weights of {source} cannot be read: {said}. {make}, or set weights=dummy"


def _of_all_ranks(faults: list[str], ranks: int) -> list[str]:
    """Return what any rank found, on every rank, each fault once."""
    if ranks == 1:
        return faults
    shared: list[list[str]] = [[] for _ in range(ranks)]
    torch.distributed.all_gather_object(shared, faults)
    return list(dict.fromkeys(fault for found in shared for fault in found))


def _refuse_quantised(source: str, config: PretrainedConfig) -> None:
    """Raise ConfigError for weights that another tool quantised: transformers' scales are lost."""
    text = config.get_text_config(decoder=True)
    for part in (config, text):
        for name in QUANTISED_SETTINGS:
            found = getattr(part, name, None)
            if not found:
                continue
            found = found if isinstance(found, dict) else vars(found)
            method = found.get("quant_method") or "an unnamed method"
            raise ConfigError(
                [
                    f"{source} was quantised by another tool ({method}: {name} in config.json), "
                    "which zinfer does not run. Take the unquantised checkpoint, which dtype=int8 "
                    "and dtype=int4 pack while it is read, or set weights=dummy"
                ]
            )


def _folder(model: ModelConfig, source: str) -> Path:
    """Return the folder of the checkpoint's files; those of the hub are downloaded first."""
    folder = Path(source).expanduser()
    if folder.is_dir():
        return folder
    from transformers.utils.hub import cached_file, get_checkpoint_shard_files

    optional = {"_raise_exceptions_for_missing_entries": False}
    names = ["config.json", WHOLE] + (["pytorch_model.bin"] if model.allow_pickle else [])
    try:
        found = {name: cached_file(source, name, **optional) for name in names}
        if not found[WHOLE] and (index := cached_file(source, INDEX, **optional)):
            get_checkpoint_shard_files(source, index)
    except OSError as error:
        raise ConfigError([unreachable(model, source, error)]) from error
    return Path(next(path for path in found.values() if path)).parent
