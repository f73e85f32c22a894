"""Keep calibration profiles as JSON files under cache_dir()/profiles, and find them again.

The newest file with this version, this machine's fingerprint and this number of threads is used
until the machine changes.
"""

from __future__ import annotations

import json
import os
import tempfile
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from zinfer.machine.measured import (
    DequantiseTime,
    DeviceAttentionTime,
    FamilyCost,
    HostAttentionTime,
    KernelTime,
    LoadCost,
    Mode,
    ModeCost,
    NvmeRate,
    PackedTime,
    PackingTime,
    Rate,
    StreamCost,
)
from zinfer.machine.profile import PROFILE_VERSION, CalibrationProfile
from zinfer.paths import cache_dir


def profiles_dir() -> Path:
    """Return $ZINFER_PROFILES, or profiles/ in zinfer's cache. Does not create it."""
    chosen = os.environ.get("ZINFER_PROFILES")
    return Path(chosen).expanduser().absolute() if chosen else cache_dir() / "profiles"


def save_profile(profile: CalibrationProfile) -> Path:
    """Write the profile whole, and return its path.

    The file is named for the fingerprint, the threads and the time.
    """
    folder = profiles_dir()
    folder.mkdir(parents=True, exist_ok=True)
    stamp = profile.created.replace(":", "").replace("-", "")
    path = folder / f"{profile.fingerprint}-t{profile.threads}-{stamp}.json"
    with tempfile.NamedTemporaryFile("w", dir=folder, suffix=".tmp", delete=False) as file:
        json.dump(document_of(profile), file, indent=1)
    os.replace(file.name, path)
    return path


def document_of(profile: CalibrationProfile) -> dict[str, Any]:
    """Return the JSON-able mapping that `profile_from_document` reads back."""
    document = asdict(profile)
    for row, cost in zip(document["modes"], profile.modes, strict=True):
        row["mode"] = str(cost.mode)
    return document


def read_profile(path: Path) -> CalibrationProfile:
    """Read the profile in that file.

    Raises:
        ValueError: it is no profile, or one of another version.
    """
    try:
        fields: dict[str, Any] = json.loads(path.expanduser().read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"hardware.profile={path} cannot be read: {error}. Try zinfer task=calibrate"
        ) from error
    if fields.get("version") != PROFILE_VERSION:
        version = fields.get("version")
        raise ValueError(
            f"hardware.profile={path} has version {version}, this zinfer reads {PROFILE_VERSION}. "
            "Try zinfer task=calibrate"
        )
    return profile_from_document(fields)


def profile_from_document(fields: dict[str, Any]) -> CalibrationProfile:
    """Make the profile of what `document_of` made, also after JSON."""
    rates = (
        "host_read",
        "host_copy",
        "device_read",
        "host_to_device_pageable",
        "host_to_device_pinned",
        "device_to_host_pinned",
    )
    values = dict(fields)
    for name in rates:
        values[name] = Rate(**values[name]) if values[name] else None
    for name in ("attention", "attention_flops"):
        values[name] = {dtype: Rate(**rate) for dtype, rate in values[name].items()}
    values["kernels"] = tuple(KernelTime(**row) for row in values["kernels"])
    values["own_kernels"] = tuple(KernelTime(**row) for row in values.get("own_kernels", ()))
    values["dequantise"] = tuple(DequantiseTime(**row) for row in values["dequantise"])
    values["packed"] = tuple(PackedTime(**row) for row in values.get("packed", ()))
    values["device_attention"] = tuple(
        DeviceAttentionTime(**row) for row in values.get("device_attention", ())
    )
    values["host_attention"] = tuple(
        HostAttentionTime(**row) for row in values.get("host_attention", ())
    )
    for name in ("host_packing", "host_unpacking"):
        values[name] = tuple(PackingTime(**row) for row in values.get(name, ()))
    values["nvme"] = tuple(
        NvmeRate(**{**row, "rate": Rate(**row["rate"])}) for row in values["nvme"]
    )
    values["families"] = tuple(FamilyCost(**row) for row in values["families"])
    values["modes"] = tuple(
        ModeCost(**{**row, "mode": Mode.read(row["mode"])}) for row in values["modes"]
    )
    values["left_out"] = tuple(values.get("left_out", ()))
    values["load"] = {mode: LoadCost(**cost) for mode, cost in values["load"].items()}
    values["stream"] = StreamCost(**values["stream"]) if values["stream"] else None
    return CalibrationProfile(**values)


def newest_profile(fingerprint: str, threads: int) -> tuple[CalibrationProfile, Path] | None:
    """Return the newest profile of this machine with that many threads, and its path."""
    for path in sorted(profiles_dir().glob(f"{fingerprint}-t{threads}-*.json"), reverse=True):
        try:
            return read_profile(path), path
        except (ValueError, TypeError, KeyError):  # of another version, or cut short
            continue
    return None


def now_text() -> str:
    """Return the time in UTC to the second: 2026-03-01T12:00:00Z."""
    return datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
