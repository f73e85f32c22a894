"""Give every test of tracking an empty working directory: the default store is made there."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def in_a_folder_of_its_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Enter a folder of its own: the default store is in the working directory."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("ZINFER_PARENT_RUN_ID", raising=False)
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
