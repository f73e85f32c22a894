"""Look for what compiling DeepSpeed's ops needs: C++ compiler, ninja, libaio, CUDA's headers."""

from __future__ import annotations

import ctypes
import glob
import os
import platform
import shlex
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterable, Mapping
from pathlib import Path


def install_command(package: str) -> str:
    """Give the command that installs a Debian package, or its namesake on Fedora and Arch."""
    sudo = "" if os.geteuid() == 0 else "sudo "
    others = {
        "libaio-dev": ("libaio-devel", "libaio"),
        "g++": ("gcc-c++", "gcc"),
        "python3-dev": ("python3-devel", "python"),
    }
    fedora, arch = others[package]
    if not shutil.which("apt-get") and shutil.which("dnf"):
        return f"{sudo}dnf install -y {fedora}"
    if not shutil.which("apt-get") and shutil.which("pacman"):
        return f"{sudo}pacman -S {arch}"
    return f"{sudo}apt-get update && {sudo}apt-get install -y {package}"


def compiler() -> str | None:
    """Find the C++ compiler that torch will call, or None."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def ninja() -> str | None:
    """Find ninja on the PATH, or beside this Python: a worker has that folder on its PATH."""
    return shutil.which("ninja") or shutil.which("ninja", path=scripts_folder())


def has_python_headers() -> bool:
    """Return whether Python.h is there; Debian keeps it in a package of its own."""
    return os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h"))


def scripts_folder() -> str:
    """Return bin/ of this Python environment.

    The interpreter's link is not followed: in a virtual environment it leads out of it.
    """
    return str(Path(sys.executable).parent)


def cuda_home() -> str | None:
    """Find the CUDA toolkit as torch.utils.cpp_extension does, or None."""
    if chosen := os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH"):
        return chosen
    if nvcc := shutil.which("nvcc"):
        return str(Path(nvcc).resolve().parent.parent)
    return "/usr/local/cuda" if os.path.isdir("/usr/local/cuda") else None


def missing_of_libaio() -> list[str]:
    """List which of libaio.h and libaio.so a compiler will not find."""
    headers = [
        *_named_folders("-I", "CFLAGS", "CPATH"),
        *_folders("CPLUS_INCLUDE_PATH"),
        "/usr/include",
        "/usr/local/include",
    ]
    wanted = {"libaio.h": headers, "libaio.so": _library_folders()}
    absent = [name for name, folders in wanted.items() if not _holds(name, folders)]
    return absent if absent and not _compiler_links_libaio() else []


def has_libaio_runtime() -> bool:
    """Return whether libaio.so.1 is there: a built op loads it."""
    if _holds("libaio.so.1", _library_folders()):
        return True
    try:
        ctypes.CDLL("libaio.so.1")
    except OSError:
        return False
    return True


def libaio_elsewhere(environ: Mapping[str, str]) -> dict[str, str]:
    """Return variables that lead compiler and loader to the libaio of CFLAGS=-I and LDFLAGS=-L.

    DeepSpeed looks for libaio with CFLAGS and LDFLAGS, and then compiles without them.
    """
    headers, libraries = (
        _named_folders("-I", "CFLAGS", environ=environ),
        _named_folders("-L", "LDFLAGS", environ=environ),
    )
    wanted = {"CPATH": headers, "LIBRARY_PATH": libraries, "LD_LIBRARY_PATH": libraries}
    return {
        name: os.pathsep.join([*folders, *_folders(name, environ)])
        for name, folders in wanted.items()
        if folders
    }


def _compiler_links_libaio() -> bool:
    """Ask the compiler itself, about 0.1 s; only when no known folder has libaio."""
    command = compiler()
    if command is None:
        return False
    program = "#include <libaio.h>\nint main() { return io_submit(0, 0, 0); }\n"
    environment = {**os.environ, **libaio_elsewhere(os.environ)}
    linking = [command, "-x", "c++", "-", "-laio", "-o", os.devnull]
    return (
        subprocess.run(
            linking, input=program, text=True, capture_output=True, env=environment
        ).returncode
        == 0
    )


def _library_folders() -> list[str]:
    system = ["/usr/lib", "/usr/lib64", "/lib", "/lib64", "/usr/local/lib", "/usr/local/lib64"]
    return [
        *_named_folders("-L", "LDFLAGS", "LIBRARY_PATH"),
        *system,
        *glob.glob(f"/usr/lib/{platform.machine()}-linux-*"),
    ]


def _named_folders(
    flag: str, flags_variable: str, path_variable: str = "", environ: Mapping[str, str] = os.environ
) -> list[str]:
    """List the folders in `-I/a -I /b`, and those of a colon-separated variable."""
    words = iter(shlex.split(environ.get(flags_variable, "")))
    folders = [(word[len(flag) :] or next(words, "")) for word in words if word.startswith(flag)]
    return [folder for folder in folders if folder] + _folders(path_variable, environ)


def _folders(variable: str, environ: Mapping[str, str] = os.environ) -> list[str]:
    return [folder for folder in environ.get(variable, "").split(os.pathsep) if folder]


def _holds(name: str, folders: Iterable[str]) -> bool:
    return any(os.path.exists(os.path.join(folder, name)) for folder in folders)
