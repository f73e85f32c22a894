#!/usr/bin/env bash
# First look at a machine with a GPU: environment, ops builds timed, tests/gpu, and the main job on OPT-1.3b and OPT-6.7b.
# Runs from an unpacked checkout, without network and without installing the checkout; the packages must be importable.
#
#   bash scripts/gpu_check.sh [OUT]      # OUT: a folder for the full results, default gpu_check/
set -uo pipefail
cd "$(dirname "$0")/.."
out=$(mkdir -p "${1:-gpu_check}" && cd "${1:-gpu_check}" && pwd)
root=$PWD
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}" HF_HUB_OFFLINE=1 MLFLOW_DISABLE_TELEMETRY=true PYTHONUNBUFFERED=1
python=${PYTHON:-python3}
disk=${NVME_PATH:-$out/swap}

section() { printf '\n== %s ==\n' "$1"; }
timed() { local name=$1 limit=$2; shift 2; local start=$SECONDS; timeout "$limit" "$@"; local code=$?; echo "[$name: $((SECONDS - start)) s, exit code $code]"; }

section environment
nvidia-smi --query-gpu=name,memory.total,power.limit,driver_version --format=csv || { echo "no GPU here"; exit 1; }
"$python" - <<'PY'
from importlib.metadata import version
for name in ("torch", "triton", "transformers", "deepspeed", "hydra-core"):
    print(name, version(name))
PY

section "ops builds"
timed "async_io and pin_memory" 420 "$python" -m zinfer.machine.native_ops build 2>&1 | tee "$out/ops.log"

section "tests/gpu"
timed tests 600 "$python" -m pytest -q -p no:cacheprovider tests/gpu 2>&1 | tee "$out/tests.log" | tail -n 15

section "packed products by the Triton kernel"
timed "packed products" 600 "$python" -m pytest -q -p no:cacheprovider tests/worker/quantised/test_triton_products.py 2>&1 \
  | tee "$out/packed.log" | tail -n 15

section "main job"
for model in opt-1.3b opt-6.7b; do
  for offload in none cpu nvme; do
    name=$model-$offload
    (cd "$out" && timed "$name" 300 "$python" -m zinfer "model=$model" "offload=$offload" offload.nvme_path="$disk" dtype=float16 batch=paper \
      batch.batch_size=4 tracking=none format=json >"$out/$name.json" 2>"$out/$name.log") || tail -n 3 "$out/$name.log"
  done
done

for kernel in auto torch; do    # int4 by the Triton kernel, and unpacked at each use
  name=opt-1.3b-int4-$kernel
  (cd "$out" && timed "$name" 300 "$python" -m zinfer model=opt-1.3b offload=none dtype=int4 "dtype.kernel=$kernel" batch=paper \
    batch.batch_size=4 tracking=none format=json >"$out/$name.json" 2>"$out/$name.log") || tail -n 3 "$out/$name.log"
done

section results
"$python" - "$out" <<'PY'
import json, pathlib, sys
print(f"{'run':18} {'status':12} {'load_s':>8} {'prefill_s':>10} {'decode_step_s':>14} {'tokens/s':>9} {'GPU peak GiB':>13} {'planned':>8}")
for path in sorted(pathlib.Path(sys.argv[1]).glob("opt-*.json")):
    text = path.read_text().split("\n[")[0]
    try:
        run = json.loads(text)
    except ValueError:
        print(f"{path.stem:18} no result")
        continue
    m = run.get("metrics") or {}
    gib = lambda value: "-" if value is None else f"{value / 2**30:.2f}"
    number = lambda name, digits=3: "-" if m.get(name) is None else f"{m[name]:.{digits}f}"
    planned = (run.get("plan") or {}).get("tiers", {}).get("device", {}).get("per_rank_bytes")
    print(f"{path.stem:18} {run['status']:12} {number('load_s'):>8} {number('prefill_s'):>10} {number('decode_step_s', 4):>14} "
          f"{number('generated_tokens_per_s', 1):>9} {gib(m.get('peak_device_allocated_bytes')):>13} {gib(planned):>8}")
    if run.get("packed"):
        print(f"{'':18} packed weights: {run['packed']['kernel']}, {run['packed']['why']}")
PY
