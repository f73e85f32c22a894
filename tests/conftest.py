"""Set up what all tests share: a quiet environment, and fixtures that are expensive to make.

Compiled ops, counted models and the demo model come from the user's own cache (~/.cache/zinfer),
so that only the first run pays for them. Everything else that zinfer keeps in its cache, such as
the list of running drivers, is private to each pytest process: two may run side by side.
"""

from __future__ import annotations

import atexit
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# More threads than free processors stall every operator.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MLFLOW_DISABLE_TELEMETRY"] = "true"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "agg")

# The environment comes first: what is imported from here on reads it.
from zinfer.machine import native_ops
from zinfer.paths import cache_dir

PRIVATE = Path(tempfile.mkdtemp(prefix="zinfer-test-cache-"))
SHARED_FOLDERS = ("models", "model_specs")

# Without a GPU, kernels in Triton are interpreted. Triton asks this when it is imported.
if native_ops.accelerator_name() != "cuda":
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.update(native_ops.worker_environment())
for name in SHARED_FOLDERS:
    shared = cache_dir() / name
    shared.mkdir(parents=True, exist_ok=True)
    (PRIVATE / name).symlink_to(shared)
os.environ["ZINFER_CACHE"] = str(PRIVATE)
# This machine's own calibration decides no test.
os.environ["ZINFER_PROFILES"] = str(PRIVATE / "profiles")
atexit.register(shutil.rmtree, PRIVATE, ignore_errors=True)
# A shell's background jobs start with Ctrl-C ignored, and so would everything that tests start.
signal.signal(signal.SIGINT, signal.default_int_handler)

TOGETHER = {
    "tests/driver/test_kills.py": "kills",
    "tests/gpu/": "gpu",
    "tests/multirun_analysis/test_report_browser.py": "browser",
    "tests/test_package.py": "package",
    "tests/worker/test_demo_model_quality.py": "quality",
}
"""Beginning of a test's id -> group: under `pytest -n 2` one process runs a group, in turn.

They share what is made once for a process, or must not meet.
"""


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Keep groups together. The marks of pytest-xdist 3.8 do nothing under pytest 9.2."""
    from xdist.scheduler import LoadGroupScheduling

    class Together(LoadGroupScheduling):
        def _split_scope(self, nodeid: str) -> str:
            return next((TOGETHER[each] for each in TOGETHER if nodeid.startswith(each)), nodeid)

    return Together(config, log) if config.getvalue("dist") == "loadgroup" else None


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip, with the reason, what this machine cannot run.

    Everything in tests/gpu needs a CUDA device.
    """
    has_cuda = native_ops.accelerator_name() == "cuda"
    has_browser = any(map(shutil.which, ("chromium", "chromium-browser", "google-chrome")))
    needed = {
        "gpu": "" if has_cuda else "needs a CUDA device and a CUDA build of torch",
        "browser": "" if has_browser else "needs a headless Chromium",
        "slurm": ""
        if shutil.which("sbatch")
        else "needs a Slurm controller (sbatch was not found)",
    }
    for item in items:
        if "gpu" in item.path.parts:
            item.add_marker("gpu")
        for marker, reason in needed.items():
            if reason and item.get_closest_marker(marker):
                item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def built_ops() -> list[str]:
    """Compile DeepSpeed's ops for every offload target: minutes, once for each machine."""
    problems = native_ops.missing_requirements(native_ops.all_ops())
    if problems:
        pytest.skip(" ".join(problems))
    ops = native_ops.all_ops()
    native_ops.build(ops)
    return ops


@pytest.fixture(scope="session")
def demo_model() -> Path:
    """Return the folder of SmolLM2-135M-Instruct. Skip where it is not to be had."""
    from zinfer.model.weights.demo_model import make_demo_model

    try:
        return make_demo_model()
    except ValueError as error:
        pytest.skip(str(error))


@pytest.fixture
def empty_ops_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Give a folder for compiled ops in which nothing is built yet."""
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(tmp_path))
    yield tmp_path
