"""Energy from invented counters: RAPL as files of a folder, NVML as a library in C's place."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from zinfer.worker import energy
from zinfer.worker.energy import Energy, Meter, host_zones
from zinfer.worker.metrics import energy_numbers

CPU = torch.device("cpu")
RANGE_UJ = 262_143_328_850
ZONES = {
    "intel-rapl:0": "package-0",
    "intel-rapl:0:0": "core",
    "intel-rapl:0:1": "dram",
    "intel-rapl:1": "package-1",
    "intel-rapl:2": "psys",
    "intel-rapl-mmio:0": "package-0",
}


def powercap(root: Path, counters: dict[str, int]) -> Path:
    """Write a powercap folder in which the counters stand at these microjoules, others at 0."""
    for zone, name in ZONES.items():
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text(f"{counters.get(zone, 0)}\n")
    return root


def test_the_host_is_its_packages_and_their_memory_each_once(tmp_path: Path) -> None:
    names = [zone.folder.name for zone in host_zones(powercap(tmp_path, {}))]
    assert names == ["intel-rapl:0", "intel-rapl:0:1", "intel-rapl:1"]


def test_generations_add_up_and_what_is_between_them_does_not_count(tmp_path: Path) -> None:
    meter = Meter(CPU, powercap(tmp_path, dict.fromkeys(ZONES, 5_000_000)))
    meter.start()
    powercap(tmp_path, dict.fromkeys(ZONES, 6_000_000))  # one joule on each of three
    meter.stop()
    powercap(tmp_path, dict.fromkeys(ZONES, 90_000_000))  # the yardstick
    meter.start()
    powercap(tmp_path, dict.fromkeys(ZONES, 92_500_000))
    meter.stop()
    assert meter.energy() == Energy(device_j=None, host_j=pytest.approx(3 * 3.5))


def test_a_counter_that_begins_again_at_zero_loses_nothing(tmp_path: Path) -> None:
    meter = Meter(CPU, powercap(tmp_path, {"intel-rapl:0": RANGE_UJ - 2_000_000}))
    meter.start()
    powercap(tmp_path, {"intel-rapl:0": 3_000_000})
    meter.stop()
    assert meter.energy().host_j == pytest.approx(5.0)


def test_without_rapl_the_energy_is_unknown_and_says_why(tmp_path: Path) -> None:
    meter = Meter(CPU, tmp_path)
    meter.start()
    meter.stop()
    found = meter.energy()
    assert found.host_j is None and "shows no RAPL package" in found.reasons[0]


def test_counters_for_root_only_are_named_with_the_remedy(tmp_path: Path) -> None:
    powercap(tmp_path, {})
    (tmp_path / "sys/class/powercap/intel-rapl:1/energy_uj").unlink()
    found = Meter(CPU, tmp_path).energy()
    assert found.host_j is None and "sudo chmod -R a+r" in found.reasons[0]


def test_a_second_rank_of_a_host_leaves_the_counting_to_the_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LOCAL_RANK", "1")
    assert Meter(CPU, powercap(tmp_path, {})).energy() == Energy(host_j=0.0)


class Nvml:
    """A library with a counter that the test moves."""

    def __init__(self, code: int = 0) -> None:
        self.millijoules, self.code, self.asked = 1_000_000, code, b""

    def nvmlInit_v2(self) -> int:
        return 0

    def nvmlDeviceGetHandleByUUID(self, uuid: bytes, handle: Any) -> int:
        self.asked = uuid
        return 0

    def nvmlDeviceGetTotalEnergyConsumption(self, handle: Any, value: Any) -> int:
        value._obj.value = self.millijoules
        return self.code


def gpu_meter(monkeypatch: pytest.MonkeyPatch, root: Path, library: Any) -> Meter:
    monkeypatch.setattr(energy, "gpu_uuid", lambda device: "GPU-1234")
    device: Any = SimpleNamespace(type="cuda")
    return Meter(device, root, nvml=library)


def test_a_gpu_counts_in_millijoules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = Nvml()
    meter = gpu_meter(monkeypatch, tmp_path, lambda: library)
    meter.start()
    library.millijoules += 4200
    meter.stop()
    assert meter.energy().device_j == pytest.approx(4.2) and library.asked == b"GPU-1234"


def no_library() -> Any:
    raise OSError("libnvidia-ml.so.1: cannot open shared object file")


@pytest.mark.parametrize(
    ("library", "said"),
    [(lambda: Nvml(code=3), "no energy counter (NVML error 3)"), (no_library, "cannot open")],
)
def test_a_gpu_without_a_counter_says_why(
    library: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = gpu_meter(monkeypatch, tmp_path, library).energy()
    assert found.device_j is None and any(said in reason for reason in found.reasons)


@pytest.mark.parametrize(
    ("ranks", "on_gpu", "tokens", "per_token", "host"),
    [
        ([Energy(host_j=30.0)], False, 10, 3.0, 3.0),
        ([Energy(host_j=30.0), Energy(host_j=0.0)], False, 10, 3.0, 3.0),
        ([Energy(device_j=40.0, host_j=10.0), Energy(device_j=60.0, host_j=0.0)], True, 10,
         10.0, 1.0),
        ([Energy(device_j=40.0), Energy(device_j=None)], True, 10, None, None),
        ([Energy()], False, 10, None, None),
    ],
)  # fmt: skip
def test_joules_of_all_ranks_are_divided_by_all_new_tokens(
    ranks: list[Energy], on_gpu: bool, tokens: int, per_token: float | None, host: float | None
) -> None:
    numbers = energy_numbers(ranks, tokens=tokens, on_gpu=on_gpu)
    assert numbers == {"energy_j_per_token": per_token, "host_energy_j_per_token": host}
