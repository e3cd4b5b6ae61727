# Start with `make help`. The logic is in paper_lib/results; this file names the tasks.

CONFIG ?= digits
SEEDS ?=
JOBS ?= 2
PYTHON ?= python3
DATA := $(or $(PAPER_DATA),data)
RESULTS := $(or $(PAPER_RESULTS),results)
RUNS := $(or $(PAPER_RUNS),runs)

export PAPER_DATA := $(abspath $(DATA))
export PAPER_RESULTS := $(abspath $(RESULTS))
export PAPER_RUNS := $(abspath $(RUNS))
export PYTHONPATH := $(CURDIR)
# Notebooks side by side share the cores; a small network cannot use two threads anyway.
CORES := $(or $(shell getconf _NPROCESSORS_ONLN 2>/dev/null),1)
THREADS := $(shell n=$$(( $(CORES) / $(JOBS) )); echo $$(( n > 0 ? n : 1 )))
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += $(if $(JOBS),-j$(JOBS))
endif

# The interpreter: PY if given, else that of an activated conda environment made from environment.yml, else .venv.
ifndef PY
ifeq ($(CONDA_DEFAULT_ENV),$(shell sed -n 's/^name: *//p' environment.yml))
PY := python
else
PY := .venv/bin/python
BUILD_ENV := $(PYTHON) paper_lib/results/environment.py build .venv
endif
endif

NOTEBOOKS := $(sort $(basename $(notdir $(wildcard notebooks/[0-9][0-9]_*.ipynb))))

.DEFAULT_GOAL := help
.PHONY: help env train figures $(NOTEBOOKS) compare report readme test lint bench lab refresh lock clean distclean

help: ## list the tasks and settings
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s%s\n", $$1, $$2}' Makefile
	@echo "  make 01_one_step run one notebook, as figures would"
	@echo
	@echo "Commands beside these: python -m paper_lib plan | train | jpegs | cooldown | bench, each with --help"
	@echo
	@echo "Settings, as in 'make figures CONFIG=cifar10 SEEDS=\"0 1 2\"':"
	@echo "  CONFIG=digits    preset: smoke, digits, cifar10_small, cifar10, imagenet, ... (README)"
	@echo "  SEEDS=\"0 1 2\"    seeds, instead of the preset's own"
	@echo "  JOBS=2           notebooks at a time, which share the cores"
	@echo "  DATA=data        where datasets are; likewise RESULTS=results and RUNS=runs"
	@echo "  PYTHON=python3   Python 3.11 or newer that .venv is built with; an activated conda environment"
	@echo "                   made from environment.yml is used instead; PY=... names another that has everything"

env: ## build .venv from environment.yml, if it is not there or out of date
	@$(BUILD_ENV)

train: env ## train a preset's runs ahead of time (figures trains what it needs)
	$(PY) -m paper_lib train --preset $(CONFIG) $(if $(SEEDS),--seeds "$(SEEDS)")

ON := --preset $(CONFIG) $(if $(SEEDS),--seeds $(SEEDS))

figures: env ## run every notebook whose result is out of date, into results/CONFIG
	@names=$$($(PY) -m paper_lib.results.notebooks outdated $(ON)) && \
	{ test -z "$$names" || $(MAKE) --no-print-directory $$names; } && \
	echo "$(words $(NOTEBOOKS)) notebooks are up to date in $(RESULTS)/$(CONFIG)"

$(NOTEBOOKS): env
	@OMP_NUM_THREADS=$${OMP_NUM_THREADS:-$(THREADS)} $(PY) -m paper_lib.results.notebooks run $@ $(ON)

compare: env ## compare results/CONFIG with what is committed, within stated tolerances
	@$(PY) -m paper_lib.results.compare $(RESULTS)/$(CONFIG)

report: figures ## one self-contained page with every figure and verdict, and the notebooks as HTML
	@$(PY) -m nbconvert --log-level ERROR --to html --output-dir .build/$(CONFIG)/report "$(RESULTS)/$(CONFIG)"/notebooks/*.ipynb
	@$(PY) -m paper_lib.results.report page $(CONFIG) .build/$(CONFIG)/report/index.html
	@echo "see .build/$(CONFIG)/report/index.html"

readme: env ## regenerate the README's tables from results/
	@$(PY) -m paper_lib.results.report readme

# A folder of its own, so that the tests train for real and never touch results/ or runs/; one thread per worker.
# Only test_cuda.py sees a GPU: what the other tests and the notebooks compare are the numbers of a CPU.
test: lint ## lint, unit tests, and every notebook on the smoke preset
	@mkdir -p .build && work=$$(mktemp -d "$(CURDIR)/.build/test.XXXXXX") && trap 'rm -rf "$$work"' EXIT && \
	export PAPER_RUNS="$$work/runs" PAPER_RESULTS="$$work/results" OMP_NUM_THREADS=1 && \
	$(PY) -m pytest -q tests/test_cuda.py && export CUDA_VISIBLE_DEVICES= && \
	$(PY) -m pytest -q -n 2 tests && \
	$(PY) -m paper_lib.results.notebooks smoke "$$work/notebooks" && \
	$(if $(NOTEBOOKS),$(PY) -m pytest -q -n 2 --dist loadfile --nbval-lax --nbval-current-env "$$work/notebooks",:)

lint: env ## ruff, for style and format
	$(PY) -m ruff check .
	$(PY) -m ruff format --check .

bench: env ## time training and averaging against plain PyTorch
	$(PY) -m benchmarks.bench

lab: env ## open JupyterLab
	$(PY) -m jupyterlab notebooks

refresh: env ## store the checked outputs of the notebooks again, after changing one
	PAPER_RESULTS="$(CURDIR)/.build/refresh" $(PY) -m paper_lib.results.notebooks refresh

lock: env ## resolve the transitive pins of environment.yml again, after changing a direct one
	$(PY) paper_lib/results/environment.py lock "$$(dirname "$$($(PY) -c 'import sys; print(sys.executable)')")/uv"

FOLDERS := data notebooks paper_lib results runs tests # .DEFAULT does not see names that exist
.PHONY: $(FOLDERS)
.DEFAULT $(FOLDERS): # a misspelled task
	@echo "no such task: $@; see make help" >&2; exit 2

clean: ## forget what is up to date, and remove caches
	rm -rf .build .pytest_cache .ruff_cache .hypothesis *.egg-info
	find paper_lib tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean ## remove .venv and ./runs too (datasets, and runs kept elsewhere, stay)
	rm -rf .venv runs
