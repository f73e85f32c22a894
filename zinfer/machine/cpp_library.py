"""Compile zinfer's own C++ kernels once for each machine, and find them again.

A library is named by its source, its compiler and the processor, so that another processor that
shares the cache folder gets one of its own. Nothing waits for anybody: two processes that compile
at the same time both write whole files of the same content.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tempfile
from functools import cache
from pathlib import Path

from zinfer.config import RunConfig
from zinfer.machine.processor import cpu_flags, cpu_model_name
from zinfer.paths import cache_dir

FLAGS = (
    "-O3", "-std=c++17", "-march=native", "-ffp-contract=fast", "-fno-math-errno",
    "-fopenmp", "-shared", "-fPIC", "-Wno-psabi",
)  # fmt: skip
COMPILE_TIMEOUT_S = 300.0
FOLDER = "kernels"


DECODE_ATTENTION = Path(__file__).parents[1] / "worker" / "kv_cache" / "decode_attention.cpp"
"""Attention on the host: beside the worker's code that calls it."""
PACK_CODES = DECODE_ATTENTION.parent / "pack_codes.cpp"
"""Packing of floats into codes of 8 or 4 bits, of keys and values and of weights."""
PRODUCTS = Path(__file__).parents[1] / "worker" / "quantised" / "products.cpp"
"""Products with packed weights, and of few rows with 16-bit weights."""
SOURCES = (DECODE_ATTENTION, PACK_CODES, PRODUCTS)


class CannotBuild(RuntimeError):
    """There is no compiled library, and the reason why."""


def build_library(source: Path) -> Path:
    """Return the shared library of one C++ source, compiling it if it is not there yet.

    Raises:
        CannotBuild: there is no compiler, or it does not accept the source.
    """
    compiler = _compiler()
    if compiler is None:
        raise CannotBuild("no C++ compiler was found. Install one: apt-get install -y g++")
    library = library_path(source, compiler)
    if library.is_file():
        return library
    try:
        library.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=library.parent, suffix=".so") as file:
            made = subprocess.run(
                [compiler, *FLAGS, str(source), "-o", file.name],
                capture_output=True, text=True, timeout=COMPILE_TIMEOUT_S, check=False,
                stdin=subprocess.DEVNULL,
            )  # fmt: skip
            if made.returncode != 0:
                first = next(
                    (line for line in made.stderr.splitlines() if "error" in line), "no message"
                )
                raise CannotBuild(f"{compiler} does not compile {source.name}: {first}")
            os.chmod(file.name, 0o755)
            os.link(file.name, f"{library}.{os.getpid()}")
        os.replace(f"{library}.{os.getpid()}", library)
    except subprocess.TimeoutExpired:
        raise CannotBuild(
            f"{compiler} did not compile {source.name} within {COMPILE_TIMEOUT_S:.0f} s"
        ) from None
    except OSError as error:
        raise CannotBuild(f"{source.name} was not compiled: {error}") from None
    return library


def library_path(source: Path, compiler: str) -> Path:
    """Return the path of this source's library on this machine."""
    digest = hashlib.sha256(source.read_bytes())
    for header in sorted([*source.parent.parent.glob("*.h"), *source.parent.glob("*.h")]):
        digest.update(header.read_bytes())
    digest.update("\0".join((*FLAGS, _version(compiler), *_processor())).encode())
    return cache_dir() / FOLDER / f"{source.stem}-{digest.hexdigest()[:16]}.so"


def sources_of(config: RunConfig, *, on_cpu: bool) -> tuple[Path, ...]:
    """List the kernels that a run of this configuration loads.

    Args:
        on_cpu: the run has no accelerator. On one, 16-bit weights are multiplied by PyTorch.
    """
    kv, dtype = config.kv_cache, config.dtype
    attends = kv.placement == "host_attention" and kv.kernel != "torch"
    is_packed = kv.is_offloaded and min(kv.bits_of_keys, kv.bits_of_values) < 16
    by_ours = dtype.kernel in ("auto", "compiled")
    has_products = dtype.bits is not None or (on_cpu and config.chooses_products)
    wanted = {
        DECODE_ATTENTION: attends,
        PACK_CODES: (is_packed and kv.kernel != "torch") or (dtype.bits is not None and by_ours),
        PRODUCTS: has_products and by_ours,
    }
    return tuple(source for source in SOURCES if wanted[source])


def is_built(source: Path) -> bool:
    """Tell whether the library of a source is there already."""
    compiler = _compiler()
    return compiler is not None and library_path(source, compiler).is_file()


def _compiler() -> str | None:
    """Return the C++ compiler: $CXX, or the first of the usual names."""
    named = (os.environ.get("CXX"), "c++", "g++", "clang++")
    return next((name for name in named if name and shutil.which(name)), None)


@cache
def _version(compiler: str) -> str:
    said = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=False)
    return said.stdout.partition("\n")[0]


@cache
def _processor() -> tuple[str, ...]:
    """Return name and instruction sets: what `-march=native` stands for."""
    return (cpu_model_name() or "unknown", *sorted(cpu_flags()))


if __name__ == "__main__":
    for each in SOURCES:
        try:
            print(f"zinfer's own kernel {each.stem} is in {build_library(each)}")
        except CannotBuild as error:
            print(f"{error}. PyTorch computes instead, more slowly")
