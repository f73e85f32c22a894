"""Keep what docs/extending.md promises: each extension is in a folder that zinfer does not know."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

import zinfer

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "extending.md").read_text()
TINY = (
    "model=tiny-llama", "dtype=float32", "batch.prompt_tokens=4", "batch.new_tokens=3",
    "launcher.omp_threads=1", "tracking=none",
)  # fmt: skip


def write_files(folder: Path) -> None:
    """Write every file that the page shows: an indented block that begins with `# path`."""
    for block in re.findall(r"(?:^ {4}.*\n|^\n(?= {4}))+", PAGE, re.MULTILINE):
        lines = [line[4:] for line in block.rstrip().splitlines()]
        starts = [
            number
            for number, line in enumerate(lines)
            if re.fullmatch(r"# (my_conf|my_engine|my_launcher)/\S+", line)
        ]
        for start, end in pairwise([*starts, len(lines)]):
            path = folder / lines[start].removeprefix("# ")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("\n".join(lines[start + 1 : end]) + "\n")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_files(tmp_path)
    return tmp_path


def run(folder: Path, *arguments: str, **environment: str) -> dict[str, Any]:
    done = subprocess.run(
        [sys.executable, "-m", "zinfer", *arguments, "format=json"],
        cwd=folder,
        env={**os.environ, "PYTHONPATH": os.pathsep.join((str(ROOT), str(folder))), **environment},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    document: dict[str, Any] = json.loads(done.stdout)
    return document


def test_the_page_shows_every_file(folder: Path) -> None:
    files = {str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file()}
    assert files == {
        "my_conf/model/my-model.yaml",
        "my_conf/offload/my-disk.yaml",
        "my_conf/batch/long.yaml",
        "my_conf/hydra/launcher/two_at_a_time.yaml",
        "my_conf/hydra/launcher/cool_down.yaml",
        "my_launcher/hydra_plugins/cool_down.py",
        "my_engine/row.py",
        "my_engine/loading.py",
    }


def test_a_model_an_offload_and_a_batch_of_ones_own_by_config_dir(folder: Path) -> None:
    config = zinfer.compose(
        model="my-model", offload="my-disk", batch="long", config_dir=folder / "my_conf"
    )
    assert (config.model.name, config.model.model_type) == ("my-model", "llama")
    assert config.offload.nvme_folder == Path("/scratch/zinfer")
    assert (config.batch.prompt_tokens, config.batch.seed) == (4096, 0)
    assert zinfer.model_spec(config).num_layers == 12


@pytest.mark.slow
@pytest.mark.parametrize(
    "where", ["--config-dir=my_conf", "hydra.searchpath=[file://{folder}/my_conf]"]
)
def test_the_command_plans_a_model_of_ones_own(where: str, folder: Path) -> None:
    planned = run(folder, where.format(folder=folder), "model=my-model", "batch=long", "task=plan")
    assert planned["status"] == "planned"
    assert planned["model"]["layers"] == 12


def install(folder: Path, target: str = "my_engine.row:MINE") -> None:
    """Leave what pip leaves of a package's metadata."""
    info = folder / "my_engine-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: my-engine\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[zinfer.engines]\nmine = {target}\n")


@pytest.mark.slow
def test_an_engine_of_another_package_runs(folder: Path) -> None:
    loading = folder / "my_engine" / "loading.py"
    loading.write_text(
        loading.read_text().replace("...  # change", "events.warning('mine loads')  # change")
    )
    refused = run(folder, "engine.name=mine", *TINY)
    assert "engine.name=mine is not one of zero, resident" in refused["problems"][0]
    install(folder)
    done = run(folder, "engine.name=mine", *TINY)
    assert done["status"] == "ok"
    assert "mine loads" in done["warnings"]
    other = run(folder, "engine.name=mine", "offload=cpu", *TINY)
    assert "engine=mine keeps weights on the device" in other["problems"][0]


@pytest.mark.parametrize("target", ["my_engine.nowhere:MINE", "my_engine.row:NOPE", "json:dumps"])
def test_a_broken_engine_of_another_package_is_a_sentence(
    target: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(folder, target)
    monkeypatch.syspath_prepend(str(folder))
    with pytest.raises(zinfer.ConfigError, match=r"engine\.name=mine is wrong"):
        zinfer.compose(overrides=["engine.name=mine"])


def launched(folder: Path, *arguments: str) -> dict[str, Any]:
    """Sweep two plans under the page's own launcher, without a plugin of others."""
    paths = os.pathsep.join(map(str, (ROOT, folder, folder / "my_launcher")))
    return run(
        folder, "-m", "--config-dir=my_conf", "hydra/launcher=cool_down", "offload=none",
        "batch.batch_size=1,2", *TINY, *arguments, PYTHONPATH=paths,
    )  # fmt: skip


@pytest.mark.slow
def test_a_launcher_class_of_ones_own_runs_a_sweep_and_goes_on_with_it(folder: Path) -> None:
    first = launched(folder, "hydra.sweep.dir=S", "tracking=sqlite", "sweep.reuse_disturbed=true")
    assert [job["status"] for job in first["jobs"]] == ["ok", "ok"]
    again = launched(folder, "hydra.sweep.dir=S", "tracking=sqlite", "sweep.reuse_disturbed=true")
    assert [job.get("reused") for job in again["jobs"]] == [True, True]


def test_a_launcher_that_raises_ends_the_sweep_with_a_sentence(folder: Path) -> None:
    plugin = folder / "my_launcher" / "hydra_plugins" / "cool_down.py"
    text = plugin.read_text().replace("time.sleep(self.rest_s)", "raise OSError('no power left')")
    plugin.write_text(text)
    done = launched(folder, "task=plan")
    assert (done["status"], [job["status"] for job in done["jobs"]]) == (
        "failed",
        ["planned", "not_run"],
    )


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("my_launcher.Mine", "must be in the package hydra_plugins"),
        ("hydra_plugins.nobody.Launcher", "which is not installed"),
    ],
)
def test_a_launcher_that_hydra_cannot_have_is_refused(target: str, said: str, folder: Path) -> None:
    done = launched(folder, f"hydra.launcher._target_={target}")
    assert said in done["problems"][0]


@pytest.mark.slow
def test_a_launcher_preset_of_ones_own_runs_a_sweep(folder: Path) -> None:
    pytest.importorskip(
        "hydra_plugins.hydra_joblib_launcher", reason="needs pip install 'zinfer[launchers]'"
    )
    done = run(
        folder, "-m", "--config-dir=my_conf", "hydra/launcher=two_at_a_time", "task=plan",
        "batch.batch_size=1,2", *TINY,
    )  # fmt: skip
    assert [job["status"] for job in done["jobs"]] == ["planned", "planned"]
