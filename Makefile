# Everything a developer runs. Needs GNU make and a Python of 3.11 or later; the rest is installed into .venv.

PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
STAMP  := $(VENV)/.installed
DEMO   := out/demo
# Worker processes of the test run; each holds torch and transformers, and takes whole files of tests, so that what a
# file shares (traced families, priced devices) is made once.
JOBS   ?= 2
# Extra arguments of pytest: make test ARGS='-k wheel'
ARGS   ?=
# Another release of transformers than the pinned one, for the census alone.
TRANSFORMERS ?=
OTHER  := $(if $(TRANSFORMERS),out/transformers-$(TRANSFORMERS))

# Constraints reach the build backend's own environment only through the environment: PIP_CONSTRAINT with pip below
# 25.3, PIP_BUILD_CONSTRAINT from then on.
export PIP_CONSTRAINT       := $(CURDIR)/constraints.txt
export PIP_BUILD_CONSTRAINT := $(CURDIR)/constraints.txt
export PIP_DISABLE_PIP_VERSION_CHECK := 1
export PYTHONUNBUFFERED := 1

SHELL       := bash
.SHELLFLAGS := -euo pipefail -c
.DEFAULT_GOAL := help
.DELETE_ON_ERROR:
.PHONY: help venv demo test lint accuracy calibrate engines engines-check releases launches serving amd inferencex cookbook peers validate validate-gpu moe-gpu bench reports figures wheel clean families census checkpoints compiled docs traces

help:  ## what each target does
	@echo "make TARGET, where TARGET is one of"
	@sed -nE 's/^([a-z-]+):.*## (.*)/  \1|\2/p' $(MAKEFILE_LIST) | while IFS='|' read -r name words; do \
	  printf '  %-13s %s\n' $$name "$$words"; done
	@echo "Settings: PYTHON=$(PYTHON) (makes .venv), JOBS=$(JOBS) (test processes), ARGS= (more for pytest)"

venv: $(STAMP)  ## create .venv and install the package with the pinned versions of constraints.txt

$(STAMP): pyproject.toml constraints.txt
	@echo "Installing tensorcast and its tools into $(VENV) (first time: some minutes)"
	@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	@$(BIN)/python -m pip install -qq --editable '.[test]'
	@touch $@

demo: $(STAMP)  ## simulate DeepSeek-V3 decode on 32 H200 and say where the report is
	@$(BIN)/tensorcast simulate deepseek-v3 --device h200 --world-size 32 --tp 1 --dp 32 --ep 32 \
	  --phase decode --batch 128 --context 4096 --out $(DEMO)
	@echo
	@echo "Report: $(DEMO)/report.md; ops.csv and summary.json beside it; trace.json opens in https://ui.perfetto.dev"

test: $(STAMP)  ## lint, types and the whole test suite: all three run, whichever fails
	@failed=; \
	$(MAKE) --no-print-directory lint || failed="lint or types"; \
	$(BIN)/python -m pytest -n $(JOBS) --dist loadscope --no-loadscope-reorder --durations=25 $(ARGS) || failed="$${failed:+$$failed, }tests"; \
	test -z "$$failed" || { echo "make test: failed: $$failed" >&2; exit 1; }

lint: $(STAMP)  ## ruff and mypy
	@failed=; $(BIN)/ruff check || failed=1; $(BIN)/mypy || failed=1; test -z "$$failed"

accuracy: $(STAMP)  ## predicted against held-out kernels -> reports/accuracy.md: [TABLES="DIR ...", else aiconfigurator-core's]
	@$(BIN)/python -m pip install -qq --editable '.[$(if $(TABLES),calibrate,silicon)]'
	@$(BIN)/python -m tensorcast.validate.accuracy.sample $(if $(TABLES),--tables $(TABLES),--from silicon) --out reports/accuracy.md

calibrate: $(STAMP)  ## fit kernel constants and models into profiles/: [TABLES=DIR, else aiconfigurator-core's tables]
	@$(BIN)/python -m pip install -qq --editable '.[$(if $(TABLES),calibrate,silicon)]'
	@$(BIN)/python -m tensorcast.calibrate.devices $(if $(TABLES),--tables "$(TABLES)",--from silicon) --profiles profiles
	@$(BIN)/python -m tensorcast.calibrate.attention_modules $(if $(TABLES),--tables "$(TABLES)",--from silicon) --profiles profiles

serving: $(STAMP)  ## predicted against measured serving -> reports/serving.md: make serving TABLE=FILE
	@test -n "$(TABLE)" || { echo "make serving needs TABLE=FILE, a CSV of measured runs" >&2; exit 2; }
	@mkdir -p out
	@$(BIN)/tensorcast predict "$(TABLE)" --out out/serving.csv --report reports/serving.md --jobs $(JOBS)

amd: $(STAMP)  ## predicted against 45 public runs on MI300X and MI355X (benchmarks/amd_runs.csv), which no fit has seen
	@$(BIN)/tensorcast predict benchmarks/amd_runs.csv

inferencex: $(STAMP)  ## predicted against 186 runs of InferenceX's posts (its repository InferenceX-app, Apache-2.0), which no fit has seen
	@$(BIN)/tensorcast predict benchmarks/inferencex_runs.csv --report reports/inferencex.md

cookbook: $(STAMP)  ## predicted against public runs of SGLang's cookbook, which no fit has seen: 32 saturated ones and 85 of 12 networks
	@$(BIN)/tensorcast predict benchmarks/cookbook_runs.csv
	@$(BIN)/tensorcast predict benchmarks/cookbook_pages.csv

peers: $(STAMP)  ## the NVIDIA runs of make inferencex beside aiconfigurator 0.12.0 -> reports/peers.md (the package index; minutes)
	@test -d out/aiconfigurator || { $(BIN)/python -m venv out/aiconfigurator && \
	  PIP_CONSTRAINT= out/aiconfigurator/bin/python -m pip install -qq aiconfigurator==0.12.0 aiconfigurator-core==0.12.0; }
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/peers.py out/aiconfigurator/bin/python

launches: $(STAMP)  ## how public benchmarks launched engines, into profiles/records/: make launches TABLE=FILE
	@test -n "$(TABLE)" || { echo "make launches needs TABLE=FILE, a CSV of launches" >&2; exit 2; }
	@$(BIN)/python -m tensorcast.calibrate.engines.launches --table "$(TABLE)" --profiles profiles

engines: $(STAMP)  ## fit engines' overheads to measured serving -> profiles/engines/, reports/left-out.md: TABLE=FILE
	@test -n "$(TABLE)" || { echo "make engines needs TABLE=FILE, a CSV of measured runs" >&2; exit 2; }
	@$(BIN)/python -m tensorcast.calibrate.engines.overheads --table "$(TABLE)" --profiles profiles \
	  --left-out reports/left-out.md

engines-check: $(STAMP)  ## engines' newest wheels held to profiles/, line by line: ARGS='vllm==0.33.0', ARGS=--pin (network)
	@$(BIN)/python -m tensorcast.validate.engines.command $(ARGS)

releases: $(STAMP)  ## served runs by their own release's rules and by the newest's -> reports/releases.md: TABLE=FILE
	@test -n "$(TABLE)" || { echo "make releases needs TABLE=FILE, a CSV of measured runs" >&2; exit 2; }
	@$(BIN)/python -m tensorcast.validate.engines.served --table "$(TABLE)" --out reports/releases.md

validate: $(STAMP)  ## this machine's kernels beside their predictions -> reports/validate-cpu (minutes)
	@OMP_NUM_THREADS=1 $(BIN)/tensorcast validate qwen3-30b-a3b --device cpu --layers 1 --out reports/validate-cpu

validate-gpu: $(STAMP)  ## all that needs a GPU -> reports/validate-gpu: make validate-gpu DEVICE=h200
	@$(BIN)/python benchmarks/validate_gpu.py --device $(or $(DEVICE),h200) $(ARGS)

moe-gpu: $(STAMP)  ## MoE ops, backends and layers on a GPU against the CPU, eight minutes: make moe-gpu DEVICE=h200
	@$(BIN)/python benchmarks/moe_gpu.py --device $(or $(DEVICE),h200) $(ARGS)

bench: $(STAMP)  ## CPU seconds and memory of questions, beside another version: [ARGS='--beside v1.0']; parts after that
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/questions.py $(ARGS)
	@$(BIN)/python benchmarks/cold_start.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/price_points.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/compare.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/predict_kernels.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/predict_rows.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/replay.py
	@OMP_NUM_THREADS=1 $(BIN)/python benchmarks/moe_layer.py

reports: $(STAMP)  ## the example reports that are kept in reports/
	@$(BIN)/tensorcast simulate deepseek-v3 --device h200 --world-size 32 --tp 1 --dp 32 --ep 32 \
	  --phase decode --batch 128 --context 4096 --out reports/simulate-deepseek-v3-h200
	@$(BIN)/tensorcast simulate qwen3-235b-a22b --device h100 --world-size 8 --tp 8 --ep 8 \
	  --phase prefill --batch 4 --input-len 4096 --out reports/simulate-qwen3-235b-h100

	@$(BIN)/tensorcast compare deepseek-v3 --device h200 --world-size 32 --input-len 4096 --output-len 1024 \
	  --ttft 2s --tpot 50ms --engine sglang --out reports/compare-deepseek-v3-32xh200
	@$(BIN)/tensorcast compare qwen3-235b-a22b-fp8 --device h100 --world-size 8 --input-len 4096 --output-len 1024 \
	  --tpot 50ms --layouts reports/qwen3-235b-layouts.yaml --out reports/compare-qwen3-235b-8xh100
	@$(BIN)/tensorcast compare gpt-oss-120b --device h100,h200,b200 --world-size 8 --input-len 4096 --output-len 1024 \
	  --tpot 20ms --out reports/compare-gpt-oss-120b

figures: $(STAMP)  ## the README's picture -> reports/readme.png
	@$(BIN)/python benchmarks/readme_figure.py

families: $(STAMP)  ## the census of MoE families -> docs/families.md
	@$(BIN)/python tests/census.py --write docs/families.md

census: $(STAMP)  ## every text model type of transformers at its own sizes -> docs/census.md (minutes): [TRANSFORMERS=5.24.0]
	@$(if $(OTHER),test -d $(OTHER) || $(BIN)/python -m pip install -qq --no-deps --target $(OTHER) transformers==$(TRANSFORMERS))
	@PYTHONPATH=$(OTHER) $(BIN)/python tests/model_types.py --write docs/census.md

checkpoints: $(STAMP)  ## engines' logged room and weights beside ours -> docs/checkpoints.md
	@$(BIN)/python tests/engine_logs.py --write docs/checkpoints.md

compiled: $(STAMP)  ## what torch.compile and torch.export take of the MoE layer: the table of docs/moe.md (minutes)
	@$(BIN)/python tests/moe_compile.py

traces: $(STAMP)  ## traces of all shipped models -> profiles/traces/ (minutes; what is as it was stays)
	@OMP_NUM_THREADS=1 $(BIN)/python tests/shipped_traces.py $(ARGS)

docs: $(STAMP)  ## the documentation site, links checked -> out/docs/index.html
	@$(BIN)/python -m sphinx -qW --keep-going -b html docs out/docs
	@echo "Site: out/docs/index.html"

wheel: $(STAMP)  ## build dist/*.whl and the source archive
	@$(BIN)/python -m build --no-isolation --outdir dist

clean:  ## remove .venv, caches and everything built
	@rm -rf $(VENV) build dist out .pytest_cache .mypy_cache .ruff_cache .hypothesis
	@find tensorcast tests benchmarks -name __pycache__ -type d -prune -exec rm -rf {} +
