"""Make the key of a job: everything that decides its numbers.

By it, in the tag zinfer.key, a sweep finds what it need not run again.
"""

from __future__ import annotations

import hashlib
import json
from functools import cache

from zinfer.config import METHOD_VERSION, RunConfig, config_key
from zinfer.job.outcome import Json
from zinfer.machine.environment import PACKAGE_FOLDER, environment, hardware_fingerprint

LIBRARIES = ("torch", "transformers", "deepspeed", "accelerate")


def key_here(config: RunConfig) -> str:
    """Return the job's key on this machine."""
    return job_key(config, environment(config, config.offload.nvme_folder))


def job_key(config: RunConfig, env: Json) -> str:
    """Return CONFIGURATION.CODE.HARDWARE: 16, 12 and 12 hexadecimal digits."""
    return f"{config_key(config)}.{code_key(env)}.{hardware_fingerprint(env)}"


def code_key(env: Json) -> str:
    """Hash the method, the libraries and the commit.

    With uncommitted changes, or without a checkout, the source files stand for the commit.
    """
    checkout = env["zinfer"]
    packages = env.get("packages") or {}
    decisive = {
        "method": METHOD_VERSION,
        "commit": checkout["commit"],
        "sources": None if checkout["commit"] and not checkout["dirty"] else sources_hash(),
        "libraries": {name: packages.get(name) for name in LIBRARIES},
    }
    return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()[:12]


@cache
def sources_hash() -> str:
    """Hash every Python file of the package, as it was when this process first asked."""
    digest = hashlib.sha256()
    for path in sorted(PACKAGE_FOLDER.rglob("*.py")):
        digest.update(f"{path.relative_to(PACKAGE_FOLDER)}\0".encode())
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]
