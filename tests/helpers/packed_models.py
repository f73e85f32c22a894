"""Put packed weights back into unmodified models, and see what they cost."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from zinfer.config import DtypeConfig
from zinfer.model.parameters import Parameter, weight_tensors
from zinfer.model.quantisable import stored_bits
from zinfer.worker.kv_cache.codes import dequantise, quantise


def first_layers(whole: Path, folder: Path, layers: int) -> Path:
    """Write a checkpoint of the first layers of another one."""
    folder.mkdir()
    for file in whole.glob("*.json"):
        (folder / file.name).write_bytes(file.read_bytes())
    settings = json.loads((whole / "config.json").read_text())
    settings["num_hidden_layers"] = layers
    (folder / "config.json").write_text(json.dumps(settings))
    kept = {
        name: tensor
        for name, tensor in load_file(whole / "model.safetensors").items()
        if "layers." not in name or int(name.split("layers.")[1].split(".")[0]) < layers
    }
    save_file(kept, folder / "model.safetensors", {"format": "pt"})
    return folder


def weights_of(model: Any) -> list[Parameter]:
    return list(weight_tensors(model, model.config.num_hidden_layers))


def rounded(model: Any, packed: dict[str, torch.Tensor], dtype: DtypeConfig) -> Any:
    """Put the values that packed bytes stand for into an unmodified model."""
    group = dtype.group_size
    for parameter in weights_of(model):
        if parameter.name not in packed:
            continue
        held = model.get_parameter(parameter.name).data
        shape = held.transpose(-1, -2).shape if parameter.is_transposed else held.shape
        rows, groups = shape[:-1].numel(), -(-shape[-1] // group)
        raw = packed[parameter.name]
        split = raw.numel() - rows * groups * 4
        bits = stored_bits(parameter, dtype)
        assert bits is not None
        values = dequantise(
            raw[:split].view(rows, -1),
            raw[split:].clone().view(torch.float16).view(rows, groups, 2),
            bits,
            group,
            torch.float32,
        )[:, : shape[-1]].reshape(shape)
        held.copy_(values.transpose(-1, -2) if parameter.is_transposed else values)
    return model


def plainly_packed(model: Any, dtype: DtypeConfig) -> dict[str, torch.Tensor]:
    """Pack the same weights by rounding each value to the nearest code."""
    group = dtype.group_size
    packed = {}
    for parameter in weights_of(model):
        bits = stored_bits(parameter, dtype)
        if bits is None:
            continue
        held = model.get_parameter(parameter.name).data
        rows = (held.transpose(-1, -2) if parameter.is_transposed else held).flatten(0, -2)
        missing = -rows.shape[1] % group
        rows = torch.cat([rows, rows[:, -1:].expand(-1, missing)], 1)
        codes, scales = quantise(rows, bits, group)
        packed[parameter.name] = torch.cat([codes.flatten(), scales.view(torch.uint8).flatten()])
    return packed


def loss_of(model: Any, ids: torch.Tensor, exact: Any) -> float:
    """Return the mean divergence of a model's predictions from those of the exact one."""
    with torch.no_grad():
        mine, theirs = (each(ids).logits.log_softmax(-1) for each in (model, exact))
    return float((theirs.exp() * (theirs - mine)).sum(-1).mean())
