"""Weights that are already on this machine under a name of the catalogue."""

from __future__ import annotations

from pathlib import Path

from zinfer.config import ModelConfig
from zinfer.model.weights.demo_model import DEMO_MODEL, demo_model_dir


def local_folder(model: ModelConfig) -> Path | None:
    """The folder that stands in for the hub: that of the demo model, once it was fetched."""
    return demo_model_dir() if model.name == DEMO_MODEL and model.source is None else None


def checkpoint_folder(model: ModelConfig) -> Path | None:
    """Where this model's weights lie on this machine; None: nowhere that is known before they are asked for."""
    folder = Path(model.source).expanduser() if model.source else local_folder(model)
    return folder if folder is not None and folder.is_dir() else None
