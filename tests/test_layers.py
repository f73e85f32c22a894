"""Import rules: `make check` must fail when a module imports a room above it, or torch in a driver.

Each test adds one import to a copy of the sources and runs the linter on that copy.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ROOMS = "A room imports only from rooms below it in this list"
LIGHT = "The driver's side imports neither torch nor transformers nor deepspeed"
ANALYSIS = "multirun_analysis never imports the worker"


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """Return a copy of the sources and of the linter's settings."""
    for package in ("zinfer", "multirun_analysis"):
        shutil.copytree(
            ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__")
        )
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(folder: Path) -> subprocess.CompletedProcess[str]:
    """Run import-linter in this folder, on the sources there."""
    program = (
        "import sys; sys.path.insert(0, '.')\n"
        "from importlinter.cli import lint_imports_command as lint; lint()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, "--no-cache"], cwd=folder, capture_output=True, text=True
    )


def broken(folder: Path) -> list[str]:
    """Return the names of the contracts that the sources in this folder break."""
    lines = lint(folder).stdout.splitlines()
    return [line.removesuffix(" BROKEN") for line in lines if line.endswith(" BROKEN")]


def test_the_sources_keep_every_contract(copy: Path) -> None:
    done = lint(copy)
    assert done.returncode == 0, done.stdout
    assert all(f"{contract} KEPT" in done.stdout for contract in (ROOMS, LIGHT, ANALYSIS))


UPWARD = [  # module, the line that is added to it, the contract that it breaks
    ("zinfer/units.py", "import zinfer.config", ROOMS),
    ("zinfer/config/tidied.py", "from zinfer.job import folder", ROOMS),
    ("zinfer/job/swap.py", "from zinfer.machine import hardware", ROOMS),
    ("zinfer/machine/hardware.py", "def late():\n    from zinfer.plan import ceiling", ROOMS),
    ("zinfer/plan/ceiling.py", "import zinfer.tracking.run", ROOMS),
    ("zinfer/driver/run.py", "from zinfer.sweep.record import Sweep", ROOMS),
    ("zinfer/worker/run.py", "import zinfer.driver.run", ROOMS),
    ("multirun_analysis/best.py", "import zinfer.worker.metrics", ANALYSIS),
    ("multirun_analysis/best.py", "def late():\n    import torch", ANALYSIS),
]


@pytest.mark.parametrize(("module", "line", "contract"), UPWARD)
def test_an_import_in_the_wrong_direction_fails(
    copy: Path, module: str, line: str, contract: str
) -> None:
    with (copy / module).open("a") as source:
        source.write(f"\n\n{line}\n")
    assert contract in broken(copy)


LIGHT_ROOMS = ("driver", "sweep", "calibration", "tracking", "plan", "job", "config")


@pytest.mark.parametrize("room", LIGHT_ROOMS)
@pytest.mark.parametrize(
    "line",
    [
        "import torch",
        "from torch import nn",
        "def late():\n    import torch.cuda",
        "try:\n    from transformers import AutoConfig\nexcept ImportError:\n    pass",
        "class Late:\n    def load(self):\n        import deepspeed",
    ],
)
def test_a_heavy_import_on_the_driver_side_fails(copy: Path, room: str, line: str) -> None:
    (copy / "zinfer" / room / "heavy.py").write_text(f'"""Heavy."""\n\n{line}\n')
    assert broken(copy) == [LIGHT]


@pytest.mark.parametrize("module", ["__main__", "units", "paths", "redact"])
def test_a_heavy_import_at_the_top_fails(copy: Path, module: str) -> None:
    with (copy / "zinfer" / f"{module}.py").open("a") as source:
        source.write("\nimport torch\n")
    assert LIGHT in broken(copy)


def test_a_room_that_no_layer_names_fails(copy: Path) -> None:
    (copy / "zinfer" / "attic").mkdir()
    (copy / "zinfer" / "attic" / "__init__.py").touch()
    assert broken(copy) == [ROOMS]


WORKER_ONLY = "zinfer.model.weights."
"""Start of the names of modules in a light room that only a worker loads."""


def modules(room: str) -> list[str]:
    """Return the dotted names of the modules of a room that a driver may load."""
    files = sorted((ROOT / "zinfer" / room).rglob("*.py"))
    names = [path.relative_to(ROOT).with_suffix("").parts for path in files]
    dotted = [".".join(name).removesuffix(".__init__") for name in names if name[-1] != "__main__"]
    return [name for name in dotted if not name.startswith(WORKER_ONLY)]


HEAVY = ("torch", "transformers", "deepspeed", "mlflow", "pandas", "matplotlib")


@pytest.mark.parametrize("room", [*LIGHT_ROOMS, "machine", "model"])
def test_importing_every_module_of_a_room_loads_no_heavy_library(room: str) -> None:
    program = f"""
import importlib, sys
for name in {modules(room)}:
    importlib.import_module(name)
    heavy = [library for library in {HEAVY} if library in sys.modules]
    if heavy:
        sys.exit(f"{{name}} loads {{heavy}}")
"""
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
