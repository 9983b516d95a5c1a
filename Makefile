# `make serve` is all that a first look needs: it makes .venv, installs, and serves MODEL.
# `make help` lists the rest.

MODEL ?= models/demo
POLICY ?= simulated
PORT ?= 8000
ARGS ?=
PYTHON ?= python3

VENV := .venv
BIN := $(VENV)/bin
TORCH := $(shell grep '^torch==' constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help serve install test test-slow test-cluster bench bench-poisson bench-peers lint format \
	protos fuzz clean

help: ## list targets
	@grep -hE '^[a-z-]+:.*##' $(MAKEFILE_LIST) | sed -E 's/:.*## /\t/' | expand -t 14
	@echo
	@echo 'make serve MODEL=DIR_OR_HUB_ID POLICY=NAME_OR_FILE PORT=8000 ARGS="--context 2048"'

# exec: Ctrl-C and signals go to the supervisor itself, not to a shell in between.
serve: $(VENV)/.installed ## serve MODEL on this machine until Ctrl-C
	@exec $(BIN)/bulkhead serve --model $(MODEL) --policy $(POLICY) --port $(PORT) $(ARGS)

install: $(VENV)/.installed ## make .venv with everything that serving needs

# Stamps are written last, so that an interrupted step is done again.
$(VENV)/.made:
	$(PYTHON) -m venv $(VENV)
	touch $@

# torch first and by itself: the largest download, and wanted in an exact version.
$(VENV)/.torch: $(VENV)/.made constraints.txt
	$(BIN)/pip install $(TORCH)
	touch $@

# The native decoder is compiled here.
$(VENV)/.installed: $(VENV)/.torch pyproject.toml constraints.txt $(wildcard runtime/stage/native/*.cpp runtime/stage/native/*.h)
	$(BIN)/pip install -c constraints.txt -e .
	touch $@

$(VENV)/.developing: $(VENV)/.installed
	$(BIN)/pip install -c constraints.txt -e '.[dev]'
	touch $@

test: $(VENV)/.developing ## tests that take no more than a minute each
	$(BIN)/python -m pytest -m 'not slow and not cluster'

test-slow: $(VENV)/.developing ## tests that take longer
	$(BIN)/python -m pytest -m slow

test-cluster: $(VENV)/.developing ## tests with `ray up` on network namespaces; needs root
	$(BIN)/python -m pytest -m cluster

# Results go to .bench/results; benchmarks/README.md says how to read them.
bench: $(VENV)/.installed ## measure links, engine, plan, a long prompt, verdicts on evidence; ten minutes
	$(BIN)/python -m benchmarks.links
	$(BIN)/python -m benchmarks.engine
	$(BIN)/python -m benchmarks.plan
	$(BIN)/python -m benchmarks.stall
	$(BIN)/python -m benchmarks.attestation

bench-poisson: $(VENV)/.installed ## measure random arrivals; five minutes
	$(BIN)/python -m benchmarks.poisson

bench-peers: $(VENV)/.installed ## measure beside vLLM and transformers; twenty minutes the first time
	$(BIN)/python -m benchmarks.peers

lint: $(VENV)/.developing ## style, types, layers, generated code
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/lint-imports
	$(BIN)/python scripts/generate_protos.py --check

format: $(VENV)/.developing ## put code into shape
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

protos: $(VENV)/.developing ## generate code from *.proto
	$(BIN)/python scripts/generate_protos.py

fuzz: $(VENV)/.developing ## fuzz what reads evidence, a million inputs each; half an hour
	$(BIN)/python scripts/fuzz.py

clean: ## remove .venv and caches
	rm -rf $(VENV) .pytest_cache .mypy_cache .ruff_cache .hypothesis .import_linter_cache *.egg-info
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
