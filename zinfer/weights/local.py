"""Weights that are already on this machine under a name of the catalogue."""

from __future__ import annotations

from pathlib import Path

from zinfer.config import ModelConfig
from zinfer.weights.demo_model import DEMO_MODEL, demo_model_dir


def local_folder(model: ModelConfig) -> Path | None:
    """The folder that stands in for the hub: that of the demo model, once it was fetched."""
    return demo_model_dir() if model.name == DEMO_MODEL and model.source is None else None
