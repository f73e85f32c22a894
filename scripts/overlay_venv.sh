#!/usr/bin/env bash
# A virtual environment on top of another: bash scripts/overlay_venv.sh VENV OVERLAY PIP_ARGUMENTS...
#
# OVERLAY sees everything that VENV has, and what pip installs goes to OVERLAY alone. So launcher
# plugins, which Hydra imports at every start, and which need other versions than zinfer's own
# (ray: cloudpickle below 3), are tested without a change to VENV. So is Triton, which torch imports
# wherever it is installed: each worker's start would take 0.2 s longer.
set -euo pipefail
venv=$(realpath "${1:?a virtual environment}"); overlay=$(realpath -m "${2:?a folder}"); shift 2
base=$("$venv/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
if [ ! -x "$overlay/bin/python" ]; then
    "$venv/bin/python" -m venv --without-pip "$overlay"
    inside=$("$overlay/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
    echo "$base" > "$inside/base.pth"
fi
if ! said=$("$venv/bin/python" -m pip --python "$overlay/bin/python" install --quiet "$@" 2>&1); then
    echo "$said" >&2
    echo "these could not be installed into $overlay: $*" >&2
    exit 1
fi
