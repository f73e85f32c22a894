#!/usr/bin/env bash
# Make zinfer's virtual environment: bash scripts/setup.sh [FOLDER]     (default .venv; `make setup` calls this)
#
# As root with apt-get, install the system packages that lack. Else print the command that does, and
# go on: only what needs the package is refused later. PYTHON=... chooses the interpreter.
set -euo pipefail
cd "$(dirname "$0")/.."
venv=${1:-.venv}

newest_python() {
    local candidate
    for candidate in ${PYTHON:-} python3 python3.13 python3.12 python3.11; do
        if command -v "$candidate" >/dev/null && "$candidate" -c 'import sys; sys.exit(sys.version_info < (3, 11))'; then
            echo "$candidate"
            return
        fi
    done
    echo "zinfer needs Python 3.11 or newer and found none. On Debian: apt-get update && apt-get install -y python3 python3-venv python3-dev" >&2
    exit 1
}

python=$(newest_python)
has_header() { echo "#include <$1>" | c++ ${CFLAGS:-} -E -x c++ - >/dev/null 2>&1; }
python_has() { "$python" -c "$1" >/dev/null 2>&1; }

packages=()
command -v c++ >/dev/null || packages+=(gcc g++)
has_header libaio.h || [ -e /usr/include/libaio.h ] || packages+=(libaio-dev)
python_has 'import ensurepip' || [ -x "$venv/bin/pip" ] || packages+=(python3-venv)
python_has 'import os, sysconfig; os.stat(os.path.join(sysconfig.get_path("include"), "Python.h"))' || packages+=(python3-dev)
if [ ${#packages[@]} -gt 0 ]; then
    install="apt-get update && apt-get install -y --no-install-recommends ${packages[*]}"
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        echo "installing ${packages[*]}"
        DEBIAN_FRONTEND=noninteractive bash -c "$install" >/dev/null || echo "could not install ${packages[*]}; later, run: $install"
    else
        echo "missing: ${packages[*]}. Run: sudo bash -c '$install'"
    fi
fi

[ -x "$venv/bin/python" ] || { echo "making $venv with $("$python" --version)" && "$python" -m venv "$venv"; }

pip() {    # say every half minute that it goes on
    "$venv/bin/python" -m pip --disable-pip-version-check "$@" &
    local running=$! started=$SECONDS
    while sleep 1 && kill -0 "$running" 2>/dev/null; do
        (((SECONDS - started) % 30)) || echo "still installing, $((SECONDS - started)) s"
    done
    wait "$running"
}

echo "installing torch and what zinfer needs (about three minutes the first time; pip keeps its downloads)"
pip install --quiet "$(grep '^torch==' constraints.txt)"    # first and by itself: the machine's own index decides between CPU and CUDA
pip install --quiet --editable '.[dev,gguf]' --constraint constraints.txt
