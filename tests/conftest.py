"""What all tests share: an environment without network and noise, and fixtures for what is expensive to make.

The compiled ops and the demo model come from the user's own cache (~/.cache/zinfer), so that only the first run pays for them.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ.setdefault(
    "OMP_NUM_THREADS", "1"
)  # more threads than free processors stall every operator
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["ZINFER_PROFILES"] = tempfile.mkdtemp(
    prefix="zinfer-test-profiles-"
)  # this machine's own calibration decides no test
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

from zinfer.machine import (
    native_ops,  # the environment comes first: what is imported later reads it
)

os.environ.update(native_ops.worker_environment())
atexit.register(shutil.rmtree, os.environ["ZINFER_PROFILES"], ignore_errors=True)
# A shell's background jobs start with Ctrl-C ignored, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run; everything in tests/gpu needs a CUDA device."""
    absent = {
        "gpu": None
        if native_ops.accelerator_name() == "cuda"
        else "needs a CUDA device and a CUDA build of torch",
        "browser": None
        if any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
        else "needs a headless Chromium",
        "slurm": None
        if shutil.which("sbatch")
        else "needs a Slurm controller (sbatch was not found)",
    }
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker("gpu")
        for marker, reason in absent.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def built_ops() -> list[str]:
    """DeepSpeed's ops for every offload target, compiled; the first run on a machine waits minutes for them."""
    problems = native_ops.missing_requirements(native_ops.default_ops())
    if problems:
        pytest.skip(" ".join(problems))
    ops = native_ops.default_ops()
    native_ops.build(ops)
    return ops


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Folder of SmolLM2-135M-Instruct; skipped where it is neither there nor to be downloaded."""
    from zinfer.model.weights.demo_model import make_demo_model

    try:
        return make_demo_model()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_ops_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder for compiled ops in which nothing is built yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path
