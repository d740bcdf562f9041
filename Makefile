# make serve    install into .venv, fetch the embedded model, serve on port 8000 until Ctrl-C
# make test     install what tests need too, and run them
# make check    formatting, lint, types
# make clean    remove everything that was written here
#
# Variables:
#   PYTHON=python3.12    the interpreter of .venv; default: the first of 3.11 and 3.12 that runs and has ensurepip
#   TORCH_INDEX=https://download.pytorch.org/whl/cpu    a package index for torch alone: a CPU build is 0.2 GB
#                        to download instead of 3 GB
#   CONFIG=FILE          what `make serve` serves; default: serve_config.yaml
#   ARGS='--port 9000'   further arguments of `headroom serve`, or of pytest under `make test`
#
# Each step leaves a stamp in .venv/stamps once it is done, named after what it depends on: an interrupted install
# resumes at its step, changed constraints reinstall. Paths are relative, because make splits names at spaces.

SHELL := /bin/sh
.DELETE_ON_ERROR:
.PHONY: serve test check format clean test-lowest install

CONFIG ?= serve_config.yaml
TORCH_INDEX ?=
export HEADROOM_HOME ?= $(CURDIR)/.headroom
export PIP_DISABLE_PIP_VERSION_CHECK := 1

VENV := .venv
CONSTRAINTS := constraints.txt
BIN = $(VENV)/bin
STAMPS = $(VENV)/stamps
KEY = $(shell cat $(CONSTRAINTS) pyproject.toml | cksum | cut -d ' ' -f 1)
PYTHON_KEY = $(shell printf %s '$(PYTHON)' | cksum | cut -d ' ' -f 1)
TORCH = $(shell grep '^torch==' $(CONSTRAINTS))
TORCH_KEY = $(shell printf %s '$(TORCH) $(TORCH_INDEX)' | cksum | cut -d ' ' -f 1)
PYTEST = "$(BIN)/python" -m pytest -m "not gpu" -rs
SIDE_BY_SIDE = -n auto --maxprocesses 8 --dist loadfile
PIP = "$(BIN)/python" -m pip install -c $(CONSTRAINTS)

serve: $(STAMPS)/run-$(KEY) $(STAMPS)/demo-$(KEY)
	@exec "$(BIN)/headroom" serve "$(CONFIG)" $(ARGS)

# Files of tests run side by side, except for those that start a service: these want the machine for themselves.
test: $(STAMPS)/test-$(KEY) $(STAMPS)/demo-$(KEY)
ifeq ($(strip $(ARGS)),)
	@$(PYTEST) $(SIDE_BY_SIDE) --ignore tests/integration
	@$(PYTEST) tests/integration
else
	@$(PYTEST) $(ARGS)
endif

check: $(STAMPS)/test-$(KEY)
	"$(BIN)/ruff" format --check .
	"$(BIN)/ruff" check .
	"$(BIN)/mypy"

format: $(STAMPS)/test-$(KEY)
	"$(BIN)/ruff" format .
	"$(BIN)/ruff" check --fix .

# The same unit and contract tests on the lowest versions that pyproject.toml allows (torch excepted), in a second
# environment.
test-lowest:
	@$(MAKE) --no-print-directory VENV=.venv-lowest CONSTRAINTS=constraints-lowest.txt \
		ARGS="$(SIDE_BY_SIDE) tests/unit tests/contract" test

install: $(STAMPS)/run-$(KEY) $(STAMPS)/demo-$(KEY)

clean:
	rm -rf .venv .venv-lowest .headroom build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# An interpreter is asked, not trusted by name: pyenv leaves names that don't run, Debian a Python without ensurepip.
$(STAMPS)/venv-$(PYTHON_KEY):
	@python=; \
	for candidate in $(if $(PYTHON),'$(PYTHON)',python3.11 python3.12 python3 python); do \
		if "$$candidate" -c 'import ensurepip, sys, venv; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))' \
			2>/dev/null; then python=$$candidate; break; fi; \
	done; \
	if [ -z "$$python" ]; then \
		echo "Python 3.11 or 3.12 with ensurepip is needed (on Debian: apt-get install python3-venv)," \
			"and $(if $(PYTHON),PYTHON=$(PYTHON) is not one,neither python3.11 nor python3.12 nor python3 is one; set PYTHON=)" >&2; \
		exit 2; \
	fi; \
	echo "making $(VENV) with $$python ($$("$$python" --version))"; \
	"$$python" -m venv --clear $(VENV)
	@mkdir -p $(STAMPS) && touch "$@"

$(STAMPS)/torch-$(TORCH_KEY): | $(STAMPS)/venv-$(PYTHON_KEY)
	@echo "installing $(TORCH): $(if $(TORCH_INDEX),from $(TORCH_INDEX),about 3 GB to download and 7 GB on disk with \
	CUDA; 0.2 GB and 0.8 GB with TORCH_INDEX=https://download.pytorch.org/whl/cpu)"
	@$(PIP) $(if $(TORCH_INDEX),--extra-index-url "$(TORCH_INDEX)") "$(TORCH)"
	@touch "$@"

$(STAMPS)/run-$(KEY): | $(STAMPS)/torch-$(TORCH_KEY)
	@echo "installing Headroom and what it needs: about 0.3 GB to download, 1 GB on disk"
	@$(PIP) -e .
	@touch "$@"

$(STAMPS)/test-$(KEY): | $(STAMPS)/run-$(KEY)
	@echo "installing what tests and checks need: about 50 MB to download"
	@$(PIP) --quiet -e '.[test]'
	@touch "$@"

$(STAMPS)/demo-$(KEY): | $(STAMPS)/run-$(KEY)
	@"$(BIN)/headroom" fetch-demo
	@touch "$@"
