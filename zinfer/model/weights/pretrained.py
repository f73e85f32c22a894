"""Published weights from the hub or a local folder; under an alive HfDeepSpeedConfig transformers loads them partitioned."""

from __future__ import annotations

from typing import Any

import torch

from zinfer.config import ConfigError, ModelConfig
from zinfer.job.events import EventLog
from zinfer.model.hf import check_pinned, load_checkpoint_config, model_class
from zinfer.model.weights.demo_model import DEMO_MODEL
from zinfer.model.weights.local import local_folder


def weights_source(model: ModelConfig) -> str:
    """Where this model's weights are: a folder or a hub id."""
    source = model.source or local_folder(model) or model.hub_id
    assert source is not None, "config.py refuses weights=pretrained without a source"
    return str(source)


def pretrained_model(model: ModelConfig, dtype: torch.dtype, events: EventLog) -> Any:
    """The model with its published weights.

    Raises:
        ConfigError: the checkpoint cannot be read: not there, no network, only pickles, or not the pinned architecture.
    """
    source = weights_source(model)
    try:
        hf_config = load_checkpoint_config(model, local_folder(model))
    except (OSError, ValueError) as error:
        raise ConfigError([unreachable(model, source, error)]) from error
    for difference in check_pinned(model, hf_config):
        events.warning(f"{source} is not what conf/model/{model.name}.yaml pins: {difference}")
    try:
        return model_class(hf_config).from_pretrained(
            source,
            config=hf_config,
            dtype=dtype,
            use_safetensors=None if model.allow_pickle else True,
            trust_remote_code=model.trust_remote_code,
            **({"gguf_file": model.gguf_file} if model.gguf_file else {}),
        )
    except OSError as error:
        raise ConfigError([unreachable(model, source, error)]) from error


def unreachable(model: ModelConfig, source: str, error: Exception) -> str:
    """One sentence for a checkpoint that cannot be read."""
    first = str(error).strip().splitlines()[0]
    if "safetensors" in str(error) and not model.allow_pickle:
        return f"{source} has no safetensors weights ({first}). Type model.allow_pickle=true if you trust its pickles, or weights=dummy"
    make = (
        "Run `make demo-model` for a small real model"
        if model.name == DEMO_MODEL
        else "Type model=custom model.source=/path/to/a/folder"
    )
    return f"the weights of {source} cannot be read: {first}. {make}, or type weights=dummy"
