"""task=plan: the page, the warnings, the advice, and grids in one process."""

from __future__ import annotations

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.composing import choices, composed
from tests.helpers.planning import planned, profile
from zinfer.job.outcome import Outcome
from zinfer.model.spec import model_spec
from zinfer.plan.advice import advice_document, suggestions
from zinfer.plan.binding import BINDING_WORDS, RESOURCES, binding_words
from zinfer.plan.page import page, verdict_line
from zinfer.plan.warnings import plan_warnings
from zinfer.units import GIB


def warnings(*overrides: str, **changes: Any) -> str:
    return "\n".join(plan_warnings(planned(*overrides, **changes)))


def lines(*overrides: str, **changes: Any) -> str:
    run = planned(*overrides, **changes)
    document = {**run.document(), "advice": advice_document(run)}
    json.dumps(document)
    return "\n".join(page(Outcome(status="planned", plan=document)))


def test_the_page_of_a_published_run() -> None:
    """LLaMA-3-70B from NVMe on an H100: 141.1 GB at 13 GB/s are 10.9 s; published 8.6 to 8.9/s."""
    text = lines(
        "model=llama-3-70b",
        "offload=nvme",
        "dtype=float16",
        "hardware=h100_2nvme",
        "batch=paper",
        "batch.batch_size=96",
    )
    assert "fits: " in text and "to spare on the tightest tier, device" in text
    assert "decode step  at best 10.9 s, bound by NVMe" in text
    assert "tokens/s     at best 8.844" in text
    assert "a new token  moves" in text and "1.4 GiB (NVMe)" in text  # 141.1 GB for 96 rows
    assert "largest batch that fits: " in text
    assert "offload=cpu" in text


def test_the_page_says_what_is_too_little_and_by_how_much() -> None:
    text = lines("model=opt-30b", "offload=none", "dtype=float16", "hardware=a6000")
    assert "does not fit: device needs" in text and "too little" in text
    assert "largest batch that fits: none" in text
    assert "offload=cpu" in text and "offload=nvme" in text


def test_an_unknown_box_is_unknown() -> None:
    unknown: dict[str, Any] = dict.fromkeys(
        (
            "device_memory_bytes_per_s",
            "host_to_device_bytes_per_s",
            "nvme_read_bytes_per_s",
            "device_free_bytes",
            "host_available_bytes",
        )
    )
    text = lines(
        "model=opt-30b",
        "offload=cpu",
        "dtype=float16",
        "hardware=a6000",
        device_flops_per_s={},
        **unknown,
    )
    assert "Cannot check the fit: this hardware's memory sizes are unknown." in text
    assert "\nfits: " not in text and "largest batch that fits: unknown" in text
    assert "how fast: unknown" in text and "task=calibrate" in text


def test_a_finished_run_shows_prediction_and_ceiling() -> None:
    metrics = {
        "generated_tokens_per_s": 5.0,
        "ceiling_generated_tokens_per_s": 10.0,
        "predicted_generated_tokens_per_s": 5.5,
    }
    said = verdict_line(
        Outcome(status="ok", plan={"prediction": {"binding_resource": "nvme"}}, metrics=metrics)
    )
    assert said == "predicted 5.5 tokens/s, measured 5: 50% of the ceiling of 10; bound by NVMe"
    assert verdict_line(Outcome(status="ok", metrics={"generated_tokens_per_s": 5.0})) is None


WARNED = [  # overrides, changes of the box, words of the warning
    (
        ("model=opt-66b", "offload=cpu", "offload.pin_memory=true"),
        {},
        "can neither move nor reclaim",
    ),
    (
        ("model=opt-13b", "offload=nvme", "zero=paper"),
        {"host_total_bytes": 100 * GIB},
        "of host memory. Set zero=tuned",
    ),
    (
        ("model=opt-66b", "offload=nvme"),
        {"host_total_bytes": 64 * GIB},
        "of host memory. Set offload.buffer_count=2 for as few",
    ),
    (
        ("model=opt-13b", "offload=nvme"),
        {"memlock_limit_bytes": 8 << 20},
        "`ulimit -l` allows 8.0 MiB",
    ),
    (
        ("model=opt-66b", "offload=nvme"),
        {"disk_filesystem": "tmpfs"},
        "is on tmpfs, which is memory, not a disk",
    ),
    (("model=opt-66b", "offload=nvme"), {"disk_filesystem": "overlay"}, "is on overlay"),
    (
        ("model=opt-66b", "offload=nvme"),
        {"disk_filesystem": "nfs4"},
        "is on nfs4, which is on the network",
    ),
    (("model=opt-66b", "offload=nvme"), {"disk_filesystem": "fuse.sshfs"}, "is on fuse.sshfs"),
    (("model=opt-1.3b", "offload=cpu"), {}, "everything fits the device and would be"),
    (
        ("model=opt-1.3b", "offload=none", "batch=paper", "batch.batch_size=1024"),
        {},
        "is beyond the knee",
    ),
    (("model=tiny-llama", "offload=nvme"), {}, "swaps nothing of this model"),
]


@pytest.mark.parametrize(("overrides", "changes", "words"), WARNED)
def test_a_person_would_warn(
    overrides: tuple[str, ...], changes: dict[str, Any], words: str
) -> None:
    assert words in warnings(*overrides, "dtype=float16", "hardware=a6000", **changes)


@pytest.mark.parametrize(
    ("page_cache", "host_available_bytes", "is_said"),
    [
        (
            "used: O_DIRECT is refused (Invalid argument), so these may be rates of memory",
            200 * GIB,
            True,
        ),
        (
            "used: O_DIRECT is refused (Invalid argument), so these may be rates of memory",
            26 * GIB,
            False,
        ),  # 24 GiB are swapped
        ("bypassed", 200 * GIB, False),
    ],
)
def test_a_page_cache_that_holds_all_swapped_weights_is_said(
    page_cache: str, host_available_bytes: int, is_said: bool
) -> None:
    measured = profile(nvme_page_cache=page_cache)
    box: dict[str, Any] = {"profile": measured, "host_available_bytes": host_available_bytes}
    said = warnings(
        "model=opt-13b",
        "offload=nvme",
        "dtype=float16",
        "hardware=a6000",
        "batch.batch_size=1",
        **box,
    )
    assert ("what is measured as NVMe would be RAM" in said) is is_said


@pytest.mark.parametrize("filesystem", ["ext4", "xfs", "btrfs", "zfs", None])
def test_nothing_is_said_of_a_sound_plan(filesystem: str | None) -> None:
    said = warnings(
        "model=opt-30b",
        "offload=nvme",
        "dtype=float16",
        "hardware=a6000",
        "batch.batch_size=4",
        disk_filesystem=filesystem,
    )
    assert said == ""


def test_suggestions_name_only_what_exists_and_what_helps() -> None:
    run = planned("model=opt-30b", "offload=nvme", "dtype=float16", "hardware=a6000", "batch=paper")
    found = suggestions(run, 16)
    by_name = {entry.override: entry for entry in found}
    assert by_name["offload=cpu"].gain == pytest.approx(31.5 / 5.6, rel=0.05)
    assert (
        by_name["batch.batch_size=16"].gain is not None and by_name["batch.batch_size=16"].gain > 10
    )
    assert all((entry.gain or 0) > 1.05 for entry in found)
    for entry in found:
        assert composed("model=opt-30b", "offload=nvme", "dtype=float16", entry.override)


@pytest.mark.parametrize("box", [name for name in choices("hardware") if name != "detect"])
def test_every_published_box_plans_every_offload(box: str) -> None:
    for offload in ("none", "cpu", "nvme"):
        run = planned("model=opt-30b", f"offload={offload}", "dtype=float16", f"hardware={box}")
        assert run.prediction.ceiling.decode_step.ceiling_s
        assert run.plan.tier("device").available_bytes
        assert run.hardware.rates_source and "data sheet" in run.hardware.rates_source


@pytest.mark.parametrize("path", [None, "/local_nvme", "~/nvme"])
def test_equal_inputs_give_byte_equal_plans(tmp_path: Path, path: str | None) -> None:
    """The DeepSpeed JSON shows nvme_path as it was given, not the folder of one job."""
    given = [f"offload.nvme_path='{path}'"] if path else []
    shown = []
    for folder in ("first", "second"):
        (tmp_path / folder).mkdir()
        command = [sys.executable, "-m", "zinfer", "task=plan", "model=opt-13b", "offload=nvme"]
        done = subprocess.run(
            [*command, "hardware=a6000", "tracking=none", "format=json", *given],
            cwd=tmp_path / folder, capture_output=True, text=True, timeout=200, check=True,
        )  # fmt: skip
        result = json.loads(done.stdout)
        shown.append(json.dumps([result["model"], result["plan"], result["deepspeed"]]))
    assert shown[0] == shown[1]
    assert (path or "${hydra:runtime.output_dir}/swap") in shown[0]


def plan_grid(tmp_path: Path, *arguments: str) -> tuple[list[dict[str, str]], str]:
    """Return the rows of the CSV, and what was printed. How fast: bench/bench_plan.py."""
    command = [
        sys.executable,
        "-X",
        "importtime",
        "-m",
        "zinfer",
        "-m",
        "task=plan",
        "hydra.sweep.dir=grid",
        *arguments,
    ]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "| torch\n" not in done.stderr  # not imported in this process
    with (tmp_path / "grid/plans.csv").open() as file:
        return list(csv.DictReader(file)), done.stdout


def test_a_grid_is_planned_in_one_process_and_tracked(tmp_path: Path) -> None:
    model_spec(composed("model=opt-13b").model)
    grid = (
        "model=tiny-llama,opt-13b",
        "offload=none,cpu,nvme",
        "batch.batch_size=1,8",
        "dtype=float16",
        "hardware=a6000",
    )
    rows, shown = plan_grid(tmp_path, *grid)
    assert len(rows) == 12
    assert {row["offload"] for row in rows} == {"none", "cpu", "nvme"}
    opt = {
        (row["offload"], row["batch.batch_size"]): row for row in rows if row["model"] == "opt-13b"
    }
    assert float(opt["cpu", "8"]["ceiling_generated_tokens_per_s"]) > 7 * float(
        opt["cpu", "1"]["ceiling_generated_tokens_per_s"]
    )
    assert opt["cpu", "1"]["binding_resource"] == "host_device_link"
    assert opt["none", "1"]["fits"] == "True"
    assert "12 plans" in shown
    assert (tmp_path / "mlflow.db").exists()


def test_every_resource_and_the_fixed_cost_have_words() -> None:
    assert set(BINDING_WORDS) == {*RESOURCES, "fixed_cost"}
    assert binding_words(None) == "-"


@pytest.mark.parametrize(
    ("overrides", "cores", "instead"),
    [
        (("launcher.omp_threads=9999",), 2, "launcher.omp_threads=2"),
        (("launcher.omp_threads=3", "launcher.ranks=2", "batch.batch_size=2"), 4, "omp_threads=2"),
        (("launcher.ranks=64", "batch.batch_size=64"), 2, "launcher.ranks=2"),
        (("launcher.ranks=2", "batch.batch_size=2"), 2, None),
        (("launcher.omp_threads=2",), 2, None),
        (("launcher.omp_threads=64",), None, None),
    ],
)
def test_threads_that_wait_for_each_other_are_said(
    overrides: tuple[str, ...], cores: int | None, instead: str | None
) -> None:
    run = planned("model=tiny-llama", "hardware.accelerator=cpu", *overrides, host_cores=cores)
    said = [each for each in plan_warnings(run) if "wait for each other" in each]
    assert len(said) == (instead is not None)
    assert all(each.endswith(instead) for each in said if instead)
