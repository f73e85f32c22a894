"""The modules that a worker imports before its first weight.

Whoever prepares workers, or measures what they weigh, imports the same list.
"""

from __future__ import annotations

import importlib

IMPORTS = (
    "torch",
    "transformers",
    "transformers.generation.utils",
    "transformers.modeling_utils",
    "transformers.integrations.deepspeed",
    "transformers.models.bloom.modeling_bloom",
    "transformers.models.llama.modeling_llama",
    "transformers.models.opt.modeling_opt",
    "deepspeed",
    "zinfer.worker.run",
    "zinfer.worker.generate",
    "zinfer.worker.metrics",
    "zinfer.worker.workload",
    "zinfer.worker.engines.zero",
    "zinfer.worker.engines.resident",
)


def import_everything() -> None:
    """Import the list: 5 to 10 s in a process that has none of it."""
    for name in IMPORTS:
        importlib.import_module(name)
