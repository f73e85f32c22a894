"""Find weights that are already on this machine under a name of the catalogue."""

from __future__ import annotations

from pathlib import Path

from zinfer.config import ModelConfig
from zinfer.model.weights.demo_model import DEMO_MODEL, demo_model_dir


def local_folder(model: ModelConfig) -> Path | None:
    """Return the folder that stands in for the hub: the demo model's, once it was fetched."""
    return demo_model_dir() if model.name == DEMO_MODEL and model.source is None else None


def checkpoint_folder(model: ModelConfig) -> Path | None:
    """Return the folder of this model's weights; None where only loading can tell."""
    folder = Path(model.source).expanduser() if model.source else local_folder(model)
    return folder if folder is not None and folder.is_dir() else None
