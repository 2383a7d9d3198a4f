PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
READY := $(VENV)/.ready
DEVICE := $(if $(shell nvidia-smi -L 2>/dev/null),cuda,cpu)

.PHONY: help demo test test-compat test-families test-flags test-mutants test-docs lint docs setup clean

help:  ## list the targets
	@awk -F ':.*## ' '/^[a-z-]+:.*## / { printf "make %-13s %s\n", $$1, $$2 }' $(MAKEFILE_LIST)

demo: $(READY)  ## set up, serve the playground with vLLM and print the acceptance tables
	$(BIN)/python -m benchmarks.acceptance --limit-per-category 4 --max-tokens 96 --output results/demo

# Two processes, each with one core; a file's tests share an engine, so they stay together.
test: lint  ## set up and run every check
	$(BIN)/python -m pytest -n 2 --dist loadfile

lint: $(READY)  ## check style, formatting and types
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

test-compat: $(READY)  ## serve drafts as other writers store them, with and without the plug-in
	$(BIN)/python -m pytest -m compat tests/vllm/compat

test-flags: $(READY)  ## run every algorithm under each of vLLM's flags
	$(BIN)/python -m pytest -m flags tests/vllm/flags

test-families: $(READY)  ## train, save, read and decode drafts for verifiers of more than sixty families
	$(BIN)/python -m pytest -m "families or not families" tests/families

test-mutants: $(READY)  ## run every command on four hundred mutated files and flags
	$(BIN)/python -m pytest -m "mutants or not mutants" tests/mutants

test-docs: $(READY)  ## run every code block of the documentation
	$(BIN)/python -m pytest -m docs tests/docs tests/examples

docs: $(READY)  ## build the documentation into site/, without a network; warnings are errors
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict --quiet
	@echo "wrote site/index.html"

setup: $(READY)  ## create the virtual environment with everything in it

# Set-up again only where the requirements have changed.
$(READY): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; v = sys.version_info; sys.exit(None if (3, 11) <= v < (3, 14) else f"Python {v.major}.{v.minor} found, 3.11 to 3.13 expected: make PYTHON=python3.11")'
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --constraint constraints.txt --editable ".[$(DEVICE),dev]"
	$(BIN)/python -m speculators_vllm.installation
	touch $(READY)

clean:  ## remove the virtual environment and all results
	rm -rf $(VENV) results site
