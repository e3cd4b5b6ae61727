# Start with `make help`. What a notebook depends on, how it runs and what of it is kept: scripts/.

CONFIG ?= digits
SEEDS ?=
JOBS ?= 2
PYTHON ?= python3
NOTEBOOKS := $(shell ls notebooks 2>/dev/null | sed -n 's/^\([0-9][0-9]_[A-Za-z0-9_-]*\)\.ipynb$$/\1/p')
# Of a run of one's own: those that need no other.
FIGURES = $(if $(OWN),$(filter 01_% 02_% 03_% 04_% 14_%,$(NOTEBOOKS)),$(NOTEBOOKS))
RUNS_NOTEBOOKS := $(filter figures $(NOTEBOOKS),$(MAKECMDGOALS))

# Settings are neither text of make's nor of the shell's: they are taken as they are, and reach commands quoted or
# as variables of the environment.
ASKED := $(filter-out file,$(origin PYTHON))
SETTINGS := CONFIG OWN SEEDS JOBS FRESH TODO PY PYTHON DATA RESULTS RUNS PAPER_DATA PAPER_RESULTS PAPER_RUNS
$(foreach v,$(SETTINGS),$(if $(value $v),$(eval override $v := $$(value $v))))
quoted = '$(subst ','\'',$1)'
absolute = $(if $(filter /%,$(firstword $1)),$1,$(CURDIR)/$1)
# A study of one's own is a Python file, whose results go under its name.
ifneq ($(OWN),)
override CONFIG := $(basename $(notdir $(OWN)))
endif
PRESET := $(if $(OWN),$(call absolute,$(OWN)),$(CONFIG))
export CONFIG PRESET SEEDS JOBS TODO
WRONG := $(shell case $(call quoted,$(CONFIG)) in (''|[.-]*|*[/[:space:]]*) echo 'CONFIG: give the name of a preset; OWN: a Python file without spaces in its path' ;; esac; \
	case $(call quoted,$(JOBS)) in (0*|*[!0-9]*) echo 'JOBS: give a number from 1' ;; esac)
define newline


endef
WRONG += $(if $(findstring $(newline),$(foreach v,$(SETTINGS),$(value $v)) $(MAKECMDGOALS)),settings have one line each)
$(if $(strip $(WRONG)),$(error $(WRONG)))

# What was made with uncommitted changes goes to a scratch folder, unless RESULTS or PAPER_RESULTS says where.
# A checkout without git has nothing to differ from, and a run of one's own is nobody's committed result.
ifeq ($(RESULTS)$(PAPER_RESULTS),)
DIRTY := $(if $(OWN),,$(shell test -e .git && git status --porcelain -- . ':!results' 2>/dev/null | head -n 1))
override RESULTS := $(if $(DIRTY),.build/dirty,results)
$(if $(and $(DIRTY),$(RUNS_NOTEBOOKS),$(if $(MAKE_RESTARTS),,first)),$(info files outside results/ differ from the commit: results go to $(RESULTS)))
endif
override PAPER_DATA := $(call absolute,$(or $(DATA),$(PAPER_DATA),data))
override PAPER_RESULTS := $(call absolute,$(or $(RESULTS),$(PAPER_RESULTS)))
override PAPER_RUNS := $(call absolute,$(or $(RUNS),$(PAPER_RUNS),runs))
export PYTHONPATH := $(CURDIR)
export PAPER_DATA PAPER_RESULTS PAPER_RUNS
HERE := "$$PAPER_RESULTS/$$CONFIG"

# What runs notebooks or tests ends with this make: one that is killed can only end shells.
ifeq ($(MAKELEVEL),0)
MAKEFLAGS += $(if $(JOBS),-j$(JOBS))
export MAKE_PID := $(shell echo $$PPID)
endif

# The interpreter: PY if given, else that of an activated conda environment made from environment.yml, else .venv.
ifndef PY
ifeq ($(CONDA_DEFAULT_ENV),$(shell sed -n 's/^name: *//p' environment.yml))
override PY := python
else
override PY := .venv/bin/python
ENV := .venv/.complete
endif
endif
python = $(call quoted,$(PY))

.DEFAULT_GOAL := help
.PHONY: help env train figures $(NOTEBOOKS) compare readme test unit nbval lint sizes bench lab refresh lock clean distclean

help: ## list the tasks and settings
	@awk -F ':.*## ' '/^[a-z]+:.*## / {printf "  make %-12s%s\n", $$1, $$2}' Makefile
	@echo "  make 03_one_step run one notebook and publish it, as figures would"
	@echo
	@echo "Commands beside these: python -m paper_lib, with --help"
	@echo
	@echo "Settings, as in 'make figures CONFIG=cifar10 SEEDS=\"0 1 2\"':"
	@echo "  CONFIG=digits    preset: smoke, digits, cifar10_small, cifar10, imagenet, ... (README)"
	@echo "  OWN=my_run.py    in place of a preset, a Python file with a run, or network and data, of your own"
	@echo "  SEEDS=\"0 1 2\"    seeds, instead of the preset's own"
	@echo "  JOBS=2           notebooks at a time, which share the cores"
	@echo "  DATA=data        where datasets are; likewise RUNS=runs and RESULTS=results, which is"
	@echo "                   .build/dirty where files outside results/ differ from the commit"
	@echo "  FRESH=1          figures: keep new files where they agree with the committed ones, too"
	@echo "  PYTHON=python3   Python 3.11 or newer that .venv is built with; an activated conda environment"
	@echo "                   made from environment.yml is used instead; PY=... names another that has everything"

env: $(ENV) ## build .venv from requirements.txt, if it is not there or out of date

# Another interpreter than .venv was built with, if one is asked for, makes it out of date too.
BUILT_WITH := $(shell cat .venv/.complete 2>/dev/null)
.venv/.complete: requirements.txt $(if $(ASKED),$(if $(subst $(BUILT_WITH),,$(PYTHON)),other-python))
	@scripts/environment.sh $(call quoted,$(PYTHON))
.PHONY: other-python
other-python:

train: $(ENV) ## train a preset's runs ahead of time (figures trains what it needs)
	@exec $(python) -m paper_lib train --preset "$$PRESET" $(if $(SEEDS),--seeds "$$SEEDS")

# A stamp for each notebook, in a folder for each combination of settings, says what it made: where that is gone or
# changed, so is the stamp. Prerequisites come from an include, which is written anew when a source changed; of files,
# those count whose names a module or notebook can have.
STAMPS := .build/stamps/$(shell printf '%s\n' $(foreach v,PRESET SEEDS PAPER_DATA PAPER_RESULTS,$(call quoted,$($v))) \
	| cksum | tr ' ' -)
ifneq ($(RUNS_NOTEBOOKS),)
$(if $(wildcard $(STAMPS)/*),$(shell $(python) -m scripts.stamps $(STAMPS) >&2))
.build/dependencies.mk: scripts/dependencies.py \
	$(shell find paper_lib/. notebooks/. \( -name __pycache__ -o -name '*[!A-Za-z0-9_.-]*' \) -prune -o \( -type d -o -name '*.py' -o -name '*.ipynb' \) -print) | $(ENV)
	@{ mkdir -p .build && touch $@.new; } || { echo "error: .build cannot be written: copy the checkout" >&2; exit 2; }
	@$(python) $< > $@.new && mv $@.new $@
include .build/dependencies.mk
endif

$(NOTEBOOKS): %: $(STAMPS)/%
$(STAMPS)/%: $(wildcard $(OWN)) | $(ENV)
	@exec $(python) -m scripts.notebooks run $* --preset="$$PRESET" --seeds="$$SEEDS" --stamps $(STAMPS) \
	--jobs="$$JOBS" --todo="$$TODO" --after $^

# What is out of date is what make would run now; settings and data are checked before it does.
figures: $(ENV) ## run every notebook whose result is out of date, into results/CONFIG; compare with the committed
	@planned=$$($(MAKE) --no-print-directory -n $(FIGURES)) || exit 2; \
	todo=$$(echo "$$planned" | sed -n 's/.*scripts\.notebooks run \([^ ]*\).*/\1/p' | tr '\n' ' '); \
	{ test -z "$$todo" || { \
	$(python) -m scripts.notebooks begin $$todo --preset="$$PRESET" --seeds="$$SEEDS" --stamps $(STAMPS) --jobs="$$JOBS" && \
	TODO="$$todo" $(MAKE) --no-print-directory $$todo && \
	{ $(python) -m scripts.compare $(if $(FRESH),,--keep) $(HERE); test $$? -lt 2; }; }; } && \
	$(python) -m scripts.report $(HERE) && \
	echo "$(words $(FIGURES)) notebooks are up to date in" $(HERE)

compare: $(ENV) ## compare results/CONFIG with what is committed, within stated tolerances
	@$(python) -m scripts.compare $(HERE)

readme: $(ENV) ## write results/CONFIG/README.md again, with every criterion
	@$(python) -m scripts.report $(HERE)

# A folder of its own, so that the tests train for real and never touch results/ or runs/; one thread per worker.
# Only test_cuda.py sees a GPU: what the other tests and the notebooks compare are the numbers of a CPU.
TEST := mkdir -p .build && work=$$(mktemp -d "$$PWD/.build/test.XXXXXX") && trap 'rm -rf "$$work"' EXIT && \
	export PAPER_RUNS="$$work/runs" PAPER_RESULTS="$$work/results" OMP_NUM_THREADS=1
PYTEST = $(python) -m pytest -q -p scripts
UNIT = $(PYTEST) tests/test_cuda.py && CUDA_VISIBLE_DEVICES= $(PYTEST) -n 2 tests
NBVAL = $(python) -m scripts.notebooks smoke "$$work/notebooks" && CUDA_VISIBLE_DEVICES= $(PYTEST) -n 2 \
	--dist loadfile --nbval-lax --nbval-current-env "$$work/notebooks"
test: lint ## lint, unit tests, and every notebook on the smoke preset
	@$(TEST) && $(UNIT) && $(NBVAL)

unit: $(ENV) ## the unit tests alone
	@$(TEST) && $(UNIT)

nbval: $(ENV) ## the notebooks on the smoke preset alone
	@$(TEST) && $(NBVAL)

lint: $(ENV) ## ruff for style and format, import-linter for layers, mypy for types
	$(python) -m ruff check .
	$(python) -m ruff format --check .
	$(python) -c "from importlinter.cli import lint_imports_command as lint; lint()" --no-cache
	$(python) -m mypy

sizes: $(ENV) ## lines, words and bytes of each part
	@$(python) -m scripts.sizes

bench: $(ENV) ## time training and averaging against plain PyTorch
	exec $(python) -m benchmarks.bench

lab: $(ENV) ## open JupyterLab, where notebooks write into .build/lab
	PAPER_RESULTS="$$PWD/.build/lab" exec $(python) -m jupyterlab notebooks

refresh: $(ENV) ## store the checked outputs of the notebooks again, after changing one
	PAPER_RESULTS="$$PWD/.build/refresh" exec $(python) -m scripts.notebooks refresh

lock: $(ENV) ## resolve requirements.in into requirements.txt again, keeping the pins that still fit
	$(python) -m uv pip compile --quiet --universal --python-version 3.11 --no-annotate \
	--custom-compile-command "make lock" -o requirements.txt requirements.in

FOLDERS := benchmarks data notebooks paper_lib results runs scripts tests # .DEFAULT does not see names that exist
.PHONY: $(FOLDERS)
.DEFAULT $(FOLDERS): # a misspelled task
	@echo $(call quoted,no such task: $@; see make help) >&2; exit 2

clean: ## forget what is up to date, and remove caches and scratch results
	rm -rf .build .pytest_cache .ruff_cache .mypy_cache .hypothesis *.egg-info
	find paper_lib tests notebooks -name __pycache__ -o -name .ipynb_checkpoints | xargs rm -rf

distclean: clean ## remove .venv and ./runs too (datasets, and runs kept elsewhere, stay)
	rm -rf .venv runs
