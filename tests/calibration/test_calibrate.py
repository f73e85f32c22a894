"""Calibration: what is fitted, how profiles are kept and found, and one real calibration."""

from __future__ import annotations

import dataclasses
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.composing import composed
from tests.helpers.planning import profile
from zinfer.calibration.fit import stream_cost
from zinfer.calibration.measure import job_config
from zinfer.calibration.rests import calm_and_usual_s, disturbance_of, line
from zinfer.job.calibration import FAMILIES, PREFILL, Job, jobs, small_model, to_run_again
from zinfer.machine import processor
from zinfer.machine.hardware import detect_hardware, machine_fingerprint
from zinfer.machine.profile import PROFILE_VERSION
from zinfer.machine.profile_files import newest_profile, profiles_dir, read_profile, save_profile
from zinfer.model.spec import model_spec
from zinfer.plan.prediction import predict
from zinfer.plan.zero_layout import zero_layout


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep the profiles of these tests apart from everybody else's."""
    monkeypatch.setenv("ZINFER_PROFILES", str(tmp_path / "profiles"))


def test_a_profile_is_read_back_as_it_was() -> None:
    assert read_profile(save_profile(profile())) == profile()


def test_the_newest_profile_of_this_machine_and_these_threads_is_found() -> None:
    save_profile(profile())
    newer = dataclasses.replace(profile(), created="2026-02-01T00:00:00Z", seconds=70.0)
    save_profile(newer)
    save_profile(dataclasses.replace(profile(), created="2026-03-01T00:00:00Z", threads=2))
    save_profile(
        dataclasses.replace(profile(), created="2026-03-01T00:00:00Z", fingerprint="1" * 12)
    )
    found = newest_profile("0" * 12, 1)
    assert found is not None and found[0] == newer
    assert newest_profile("2" * 12, 1) is None


def test_a_broken_or_older_profile_is_passed_over_and_a_named_one_is_refused() -> None:
    path = save_profile(profile())
    (profiles_dir() / f"{'0' * 12}-t1-20270101T000000Z.json").write_text("{")
    found = newest_profile("0" * 12, 1)
    assert found is not None and found[1] == path
    path.write_text(path.read_text().replace(f'"version": {PROFILE_VERSION}', '"version": 1'))
    with pytest.raises(ValueError, match="Try zinfer task=calibrate"):
        read_profile(path)


def test_detected_hardware_takes_its_rates_from_the_profile() -> None:
    config = composed("hardware.accelerator=cpu").hardware
    assert detect_hardware(config, None, 1, 1).rates_source is None
    save_profile(dataclasses.replace(profile(), fingerprint=machine_fingerprint(config)))
    box = detect_hardware(config, None, 1, 1)
    assert box.host_memory_bytes_per_s == 10e9
    assert box.device_flops_per_s["float32"] == pytest.approx(10e9)
    assert box.rates_source == "calibrated 2026-01-01T00:00:00Z"
    assert detect_hardware(config, None, 1, 7).profile is None  # another number of threads
    given = detect_hardware(dataclasses.replace(config, host_memory_bytes_per_s=1e9), None, 1, 1)
    assert given.host_memory_bytes_per_s == 1e9  # what was typed wins


def test_a_published_box_never_takes_this_machine_s_profile() -> None:
    here = composed("hardware.accelerator=cpu").hardware
    save_profile(dataclasses.replace(profile(), fingerprint=machine_fingerprint(here)))
    assert detect_hardware(here, None, 1, 1).profile is not None
    assert detect_hardware(composed("hardware=a6000").hardware, None, 1, 1).profile is None


@pytest.mark.parametrize(
    ("rows", "parameter_s"),
    [
        (
            [(10, 20_000_000, 0.020), (4, 100_000_000, 0.054)],
            0.001,
        ),  # at 2 GB/s: 10 ms and 50 ms, the rest is 1 ms a parameter
        (
            [(10, 20_000_000, 0.020), (4, 100_000_000, 0.054), (8, 20_000_000, 0.002)],
            0.001,
        ),  # a swap file that was in some cache
        ([(10, 20_000_000, 0.010), (10, 40_000_000, 0.020)], 0.0),
        (
            [(10, 20_000_000, 0.002), (4, 20_000_000, 0.003)],
            0.0,
        ),  # faster than the handle alone: no wait is below nothing
    ],
)
def test_streaming_is_the_handle_s_rate_and_a_wait_for_each_parameter(
    rows: list[tuple[int, int, float]], parameter_s: float
) -> None:
    cost = stream_cost(rows, 2e9)
    assert cost is not None
    assert cost.parameter_s == pytest.approx(parameter_s, abs=1e-9)
    assert cost.bytes_per_s == 2e9


@pytest.mark.parametrize(
    ("points", "expected"),
    [
        ([(0, 1.0), (1, 3.0), (2, 5.0)], (1.0, 2.0)),
        ([(1, 1.0), (2, 1.5), (3, 1.0), (4, 1.5)], (1.0, 0.1)),  # by hand: slope 0.5 / 5
        ([(1, 1.0), (2, 3.0)], (0.0, 7 / 5)),  # it would begin below zero
        ([(1, 3.0), (2, 1.0)], (2.0, 0.0)),  # it would fall
    ],
)
def test_a_line_of_costs_never_begins_below_zero_and_never_falls(
    points: list[tuple[float, float]], expected: tuple[float, float]
) -> None:
    assert line(points) == pytest.approx(expected)


def test_kernels_between_measured_points_lie_on_a_line_in_logarithms() -> None:
    box = profile()
    for rows, numel in ((1, 4096), (16, 65_536), (4, 131_072), (1024, 4_194_304)):
        assert box.kernel_s("float32", rows, numel) == pytest.approx(2 * rows * numel / 10e9)
    assert box.kernel_s("float16", 1, 4096) is None


def test_calibration_jobs_are_of_four_families_and_three_swap() -> None:
    chosen = list(jobs(("float32",), nvme=True, cpu_offload=False))
    assert {job.family for job in chosen if job.mode == "none" and job.leaf} == set(FAMILIES)
    config = composed("hardware.accelerator=cpu", "offload=nvme")
    swapped = []
    for job in chosen:
        if job.mode == "nvme":
            job_config_ = job_config(job, config)
            layout = zero_layout(
                job_config_, model_spec(job_config_.model, compute_dtype="float32")
            )
            swapped.append((layout.swapped_count, layout.swapped_numel))
            assert not layout.swapped_count or any(
                dataclasses.replace(job, mode="none", rounds=other.rounds) == other
                for other in chosen
            )
    assert [count > 0 for count, _ in swapped] == [False, True, True, True]
    assert (
        len({round(numel / count, -5) for count, numel in swapped[1:]}) == 3
    )  # parameters of three sizes, so that both costs show


@pytest.mark.parametrize(
    ("rounds", "times_s", "is_run_again"),
    [
        (3, [1.0], True),
        (3, [1.0, 1.05], False),
        (3, [1.5, 1.0], True),  # a neighbour had one of them
        (3, [1.5, 1.0, 1.2], False),  # often enough
        (4, [1.5, 1.0, 1.05], False),
        (2, [1.0], True),
        (1, [1.0], False),
    ],
)
def test_a_job_runs_until_its_two_calmest_runs_agree(
    rounds: int, times_s: list[float], is_run_again: bool
) -> None:
    job = Job(family="opt", mode="none", dtype="float32", rounds=rounds)
    assert to_run_again([job], {job: times_s}) == ([job] if is_run_again else [])


def test_calm_is_the_quarter_of_steps_that_nobody_disturbed() -> None:
    steps = [1.0, 1.0, 1.0, 2.0, 2.0, 2.0, 2.0]
    samples = [
        {"kind": "warmup", "prefill_s": 9.0, "decode_step_s": [9.0] * 7},
        {"kind": "timed", "prefill_s": 5.0, "decode_step_s": steps},
    ]
    samples.append({"kind": "timed", "prefill_s": 4.0, "decode_step_s": steps})
    assert calm_and_usual_s(
        Job(family="opt", mode="none", dtype="float32"), {"samples": samples}
    ) == (1.0, 2.0)
    prefill = Job(family="opt", mode="none", dtype="float32", batch=PREFILL)
    assert calm_and_usual_s(prefill, {"samples": samples}) == (4.0, 4.5)


def test_disturbance_is_what_usual_runs_take_over_the_calmest_of_the_same_job() -> None:
    """Median steps over the calmest quarter: 1.1 / 1.0, 1.3 / 1.0 and 2.4 / 2.0; median 1.2."""

    def run(seconds: float, calm_s: float) -> dict[str, Any]:
        return {
            "samples": [
                {
                    "kind": "timed",
                    "prefill_s": 1.0,
                    "decode_step_s": [calm_s, calm_s, seconds, seconds, seconds, seconds, seconds],
                }
            ]
        }

    config = composed("hardware.accelerator=cpu")
    one, other = (
        Job(family="opt", mode="none", dtype="float32"),
        Job(family="llama", mode="none", dtype="float32"),
    )
    measured = [
        (one, config, run(1.1, 1.0)),
        (one, config, run(1.3, 1.0)),
        (other, config, run(2.4, 2.0)),
    ]
    assert disturbance_of(measured) == pytest.approx(1.2)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_calibration_model_is_one_of_its_family(family: str) -> None:
    spec = model_spec(small_model(family, 8, 256))
    assert spec.model_type == family and spec.num_layers == 8 and spec.hidden_size == 256


@pytest.mark.parametrize("bits", [8, 4])
def test_dequantising_is_timed_at_every_size(bits: int) -> None:
    import torch

    from zinfer.worker.calibrate_kernels import DEQUANTISE_SIZES, dequantise_times

    rows = list(dequantise_times(bits, "bfloat16", torch.device("cpu")))
    assert [(row["bits"], row["dtype"], row["weight_numel"]) for row in rows] == [
        (bits, "bfloat16", size**2) for size in DEQUANTISE_SIZES
    ]
    assert rows[-1]["seconds"] > rows[0]["seconds"] > 0  # of 4,096 times as many weights


def test_page_cache_is_declared_where_direct_reads_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Fake at the system call: this machine's disks take O_DIRECT."""
    import os

    from zinfer.worker import calibrate_kernels

    assert calibrate_kernels._page_cache(tmp_path) == "bypassed"

    def refuse(*_: object) -> int:
        raise OSError(22, "Invalid argument")

    monkeypatch.setattr(os, "open", refuse)
    assert "O_DIRECT is refused" in calibrate_kernels._page_cache(tmp_path)


def calibrating(tmp_path: Path) -> subprocess.Popen[str]:
    """Run `zinfer task=calibrate` with its job folder and its swap in tmp_path."""
    command = [
        sys.executable,
        "-m",
        "zinfer",
        "task=calibrate",
        "format=json",
        "launcher.omp_threads=1",
        "hardware.accelerator=cpu",
    ]
    command += [f"hydra.run.dir={tmp_path / 'job'}", f"offload.nvme_path={tmp_path / 'disk'}"]
    return subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


@pytest.mark.slow
def test_a_calibration_measures_everything_and_plans_use_it(
    tmp_path: Path, built_ops: list[str]
) -> None:
    process = calibrating(tmp_path)
    outcome = json.loads(process.communicate(timeout=900)[0])
    assert (process.returncode, outcome["status"]) == (0, "ok"), outcome["reason"]
    found = newest_profile(machine_fingerprint(composed("hardware.accelerator=cpu").hardware), 1)
    assert found is not None
    profile, _ = found
    assert profile.host_read.median > 1e8 and profile.host_copy.median > 1e8
    assert {cost.model_type for cost in profile.families} == {*FAMILIES, "*"}
    assert {str(cost.mode) for cost in profile.modes} >= {
        "resident",
        "none",
        "cpu",
        "nvme",
        "none, by module",
        "nvme, by module",
    }
    assert {row.operation for row in profile.nvme} == {
        "read",
        "write",
    } and profile.stream is not None
    for kind in {row.dtype for row in profile.kernels}:
        assert (
            profile.flops_per_s(kind)
            and profile.dequantise_s(8, kind, 1 << 20)
            and profile.dequantise_s(4, kind, 1 << 20)
        )
    assert all(cost.op_s > 0 for cost in profile.families)
    assert not list((tmp_path / "disk").glob("zinfer-swap-*"))
    for overrides in (
        ("offload=none",),
        ("offload=nvme", "dtype=bfloat16"),
        ("dtype=int4",),
        ("engine=resident",),
    ):
        config = composed("model=opt-125m", "hardware.accelerator=cpu", *overrides)
        spec = model_spec(config.model, compute_dtype="bfloat16")
        said = predict(spec, config, detect_hardware(config.hardware, None, 1, 1))
        assert said.decode_step_s is not None and said.generated_tokens_per_s is not None, overrides


@pytest.mark.slow
def test_an_interrupted_calibration_leaves_nothing(tmp_path: Path, built_ops: list[str]) -> None:
    process = calibrating(tmp_path)
    deadline_s = time.monotonic() + 200
    while (
        not list((tmp_path / "disk").glob("zinfer-swap-*")) and time.monotonic() < deadline_s
    ):  # its jobs on NVMe have begun
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    outcome = json.loads(process.communicate(timeout=180)[0])
    assert (process.returncode, outcome["status"]) == (130, "killed")
    assert not list((tmp_path / "disk").glob("zinfer-swap-*"))
    assert not list(profiles_dir().glob("*.json"))


def test_the_fingerprint_knows_the_machine_not_the_disk(monkeypatch: pytest.MonkeyPatch) -> None:
    config = composed("hardware.accelerator=cpu").hardware
    before = machine_fingerprint(config)
    assert machine_fingerprint(config) == before
    monkeypatch.setattr(processor, "cpu_model_name", lambda: "another processor")
    assert machine_fingerprint(config) != before
