"""The table of machines: what the numbers depend on besides the configuration."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from multirun_analysis.runs import Json
from multirun_analysis.spread import format_number
from multirun_analysis.table import Column, Table, text_cell
from zinfer.units import GIB

ROWS = (
    ("processor", ("cpu", "model")),
    ("usable cores", ("cpu", "usable_cores")),
    ("instruction sets", ("cpu", "instruction_sets")),
    ("frequency governor", ("cpu", "governor")),
    ("operating system", ("os",)),
    ("kernel", ("kernel",)),
    ("Python", ("python",)),
    ("zinfer", ("zinfer", "version")),
    ("commit", ("zinfer", "commit")),
)
"""Name of a row, and where environment.json has its value."""
PACKAGES = ("torch", "transformers", "deepspeed", "accelerate", "mlflow", "hydra-core")

Look = Callable[[Json], object]


def environment_table(environments: Sequence[tuple[str, Json]]) -> Table:
    """Build one column for each machine and commit, from its environment.json."""
    looks: list[tuple[str, Look]] = [("GPUs", gpus), ("host memory GiB", _host_gib)]
    looks += [(name, _lookup(path)) for name, path in ROWS]
    looks += [(package, _lookup(("packages", package))) for package in PACKAGES]
    columns = (
        Column(key="what", head=""),
        *(Column(key=name, head=name) for name, _ in environments),
    )
    rows = [
        (text_cell(name), *(text_cell(look(found)) for _, found in environments))
        for name, look in looks
    ]
    return Table(
        name="environment",
        title="Where this was measured",
        note="From environment.json of the newest run of each machine and commit.",
        columns=columns,
        rows=tuple(row for row in rows if any(cell.value is not None for cell in row[1:])),
    )


def _lookup(path: Sequence[str]) -> Look:
    def look(found: Json) -> object:
        value: object = found
        for part in path:
            value = value.get(part) if isinstance(value, dict) else None
        return ", ".join(map(str, value)) or "none" if isinstance(value, list) else value

    return look


def _host_gib(found: Json) -> str | None:
    return _gib(_lookup(("memory", "total_bytes"))(found))


def _gib(count: object) -> str | None:
    return format_number(count / GIB) if isinstance(count, int | float) else None


def gpus(found: Json) -> str | None:
    """Describe the GPUs; None without one.

    'NVIDIA H100 80GB HBM3 (80 GiB, driver 550.54, power limit 700 W)'.
    """
    lines = []
    for gpu in found.get("gpus") or []:
        watts = gpu.get("power_limit_watts")
        facts = [
            f"{_gib(gpu.get('total_bytes'))} GiB" if gpu.get("total_bytes") else None,
            f"driver {gpu['driver_version']}" if gpu.get("driver_version") else None,
            f"power limit {watts:g} W" if watts else "power limit not known",
        ]
        lines.append(f"{gpu.get('name')} ({', '.join(filter(None, facts))})")
    return "; ".join(lines) or None
