"""Build a wheel and an sdist, and use them as people do: from an empty folder, without a checkout.

The environments made here see the installed libraries of this one, so nothing is downloaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
import venv
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
pytest.importorskip("hatchling", reason="needs hatchling: pip install hatchling")
pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Copy the files that git knows or would take, so that building leaves nothing here."""
    folder = tmp_path_factory.mktemp("sources")
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if names.returncode:
        pytest.skip("needs a git checkout")
    for name in names.stdout.splitlines():
        if (ROOT / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes((ROOT / name).read_bytes())
    return folder


def built(kind: str, sources: Path, out: Path) -> Path:
    """Build a `wheel` or an `sdist` of the sources with hatchling, offline."""
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(out)]
    done = subprocess.run(command, cwd=sources, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (package,) = out.iterdir()
    return package


@pytest.fixture(scope="module")
def wheel(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return built("wheel", sources, tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def sdist(sources: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the sdist, unpacked."""
    archive = built("sdist", sources, tmp_path_factory.mktemp("sdist"))
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(archive) as packed:
        packed.extractall(folder, filter="data")
    (top,) = folder.iterdir()
    return top


def environment_with(package: Path, folder: Path) -> Path:
    """Install a wheel into a new environment that sees the libraries of this one; its bin folder.

    `--no-deps`, and a .pth file that names this environment's libraries: nothing is downloaded.
    """
    venv.create(folder, symlinks=True)
    (site,) = folder.glob("lib/python*/site-packages")
    here = [path for path in sys.path if path.endswith("-packages")]
    with zipfile.ZipFile(package) as packed:
        packed.extractall(site)
    (site / "libraries.pth").write_text("\n".join(here))
    for name, target in (("zinfer", "zinfer"), ("zinfer-report", "multirun_analysis")):
        script = folder / "bin" / name
        script.write_text(
            f"#!{folder}/bin/python\nfrom {target}.__main__ import main\nmain()\n",
        )
        script.chmod(0o755)
    return folder / "bin"


@pytest.fixture(scope="module")
def commands(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return environment_with(wheel, tmp_path_factory.mktemp("environment") / "venv")


def ran(commands: Path, folder: Path, name: str, *arguments: str) -> str:
    """Run a command of the wheel in a folder without a checkout. Stdout."""
    environment = {name: text for name, text in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [str(commands / name), *arguments],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_wheel_has_the_console_commands_and_no_tests(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as packed:
        names = packed.namelist()
        (entry_points,) = [name for name in names if name.endswith("entry_points.txt")]
        text = packed.read(entry_points).decode()
    assert "zinfer = zinfer.__main__:main" in text
    assert "zinfer-report = multirun_analysis.__main__:main" in text
    assert {"zinfer/conf/config.yaml", "zinfer/examples/prompts.txt"} <= set(names)
    assert not [name for name in names if name.startswith(("tests/", "bench/", "scripts/"))]


def test_the_wheel_plans_from_an_empty_folder(commands: Path, tmp_path: Path) -> None:
    help_ = ran(commands, tmp_path, "zinfer", "--help")
    assert "opt-175b" in help_
    said = ran(commands, tmp_path, "zinfer", "model=opt-175b", "task=plan", "hardware=a6000",
               "offload=cpu", "dtype=int4", "tracking=none", "format=json")  # fmt: skip
    assert json.loads(said)["plan"]["fits"] is True
    where = ran(commands, tmp_path, "python", "-c", "import zinfer; print(zinfer.__file__)")
    assert Path(where.strip()).is_relative_to(commands.parent)


PRESETS = sorted(path.stem for path in (ROOT / "conf" / "experiment").glob("*.yaml"))
SMALL = [f"tiny/{name}" for name in PRESETS if not name.startswith("demo")]


@pytest.mark.parametrize("preset", [*PRESETS, *SMALL])
def test_the_wheel_composes_every_preset_from_an_empty_folder(
    commands: Path, tmp_path: Path, preset: str
) -> None:
    program = f"""
from hydra import compose, initialize_config_dir
from zinfer.config import parse_config
from zinfer.paths import conf_dir
with initialize_config_dir(conf_dir(), version_base="1.3"):
    config = parse_config(compose("config", overrides=[
        "experiment={preset}", "offload.nvme_path={tmp_path}", "weights=dummy"]))
print(config.batch.batch_size)
"""
    assert int(ran(commands, tmp_path, "python", "-c", program)) > 0


def test_the_wheel_runs_and_reports_from_an_empty_folder(
    commands: Path, tmp_path: Path, built_ops: list[str]
) -> None:
    tiny = ("model=tiny-llama", "launcher.omp_threads=1", "batch.prompt_tokens=4",
            "batch.new_tokens=3", "batch.repeats=2", "hardware.accelerator=cpu")  # fmt: skip
    ran(commands, tmp_path, "zinfer", *tiny)
    assert "tiny-llama" in ran(commands, tmp_path, "zinfer-report")
    assert list(tmp_path.glob("reports/*/report.html"))


NEEDED = [  # what `make setup`, `make test` and `make demo` read
    "Makefile", "pyproject.toml", "constraints.txt", "scripts/setup.sh", "conf/config.yaml",
    "conf/experiment/demo.yaml", "examples/prompts.txt", "tests/conftest.py", "bench/bench.py",
    "tests/data/model_facts.json", "docs/reproducing.md", ".ci/run", "README.md", "CHANGELOG.md",
]  # fmt: skip


def test_the_sdist_has_what_setup_test_and_demo_need(sdist: Path) -> None:
    assert [name for name in NEEDED if not (sdist / name).is_file()] == []
    for target in ("setup", "test", "demo", "check", "bench"):
        dry = ["make", "--dry-run", target]
        done = subprocess.run(dry, cwd=sdist, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_every_tracked_source_is_in_the_sdist(sources: Path, sdist: Path) -> None:
    tracked = {
        path.relative_to(sources).as_posix() for path in sources.rglob("*") if path.is_file()
    }
    packed = {path.relative_to(sdist).as_posix() for path in sdist.rglob("*") if path.is_file()}
    assert tracked - packed == set()


def test_a_wheel_built_from_the_sdist_plans_too(sdist: Path, tmp_path: Path) -> None:
    commands = environment_with(built("wheel", sdist, tmp_path / "wheel"), tmp_path / "venv")
    (tmp_path / "empty").mkdir()
    said = ran(commands, tmp_path / "empty", "zinfer", "task=plan", "tracking=none", "format=json")
    assert json.loads(said)["status"] == "planned"


def test_tests_of_the_sdist_are_collected_without_a_checkout(sdist: Path) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "--collect-only", "tests/plan", "tests/config"]
    environment = {**os.environ, "PYTHONPATH": str(sdist)}
    done = subprocess.run(command, cwd=sdist, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]
