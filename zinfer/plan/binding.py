"""Name what can bind a phase of a run, for programs and for people. Imports nothing."""

from __future__ import annotations

from typing import Literal

Resource = Literal["device_compute", "device_memory", "host_device_link", "nvme", "host_memory"]
RESOURCES: tuple[Resource, ...] = (
    "device_compute",
    "device_memory",
    "host_device_link",
    "nvme",
    "host_memory",
)
Binding = Resource | Literal["fixed_cost"]
"""A resource, or the time that Python and kernel launches take whatever the number of tokens."""

BINDING_WORDS: dict[str, str] = {
    "device_compute": "device arithmetic",
    "device_memory": "device memory",
    "host_device_link": "host-device link",
    "nvme": "NVMe",
    "host_memory": "host memory",
    "fixed_cost": "fixed cost of each layer",
}
"""What a table or a sentence calls each of them."""


def binding_words(name: str | None) -> str:
    """Return the words for what binds; '-' where nothing is known."""
    return "-" if name is None else BINDING_WORDS.get(name, name)
