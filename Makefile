# The commands for development. `make` lists them. They need Python 3.11, 3.12 or 3.13 and a package registry; no GPU.

PYTHON ?= $(firstword $(foreach one,python3.11 python3.12 python3.13,$(shell $(one) -c "" 2>/dev/null && echo $(one))) python3)
VENV ?= .venv
PYTHONS ?= python3.11 python3.12 python3.13
QAQ_HOME ?= var
PORT ?= 3000

BIN := $(VENV)/bin
export QAQ_HOME

.DEFAULT_GOAL := help
.PHONY: help install demo ui test test-pythons test-slow test-consumers bench chaos docs docs-links pictures check format clean

help: ## List the targets
	@sed -n 's/^\([a-z-]*\):.*## \(.*\)/  make \1|\2/p' $(MAKEFILE_LIST) | awk -F '|' '{printf "%-23s%s\n", $$1, $$2}'

install: $(VENV)/.installed ## Create the virtual environment and install the project into it

define NEEDED_PYTHON
import sys
found = sys.version_info[:2]
if not (3, 11) <= found <= (3, 13):
    sys.exit(f"Python 3.11, 3.12 or 3.13 is needed; $(PYTHON) is {found[0]}.{found[1]}. Install one, or: make PYTHON=python3.12")
endef
export NEEDED_PYTHON

# torch is installed first and alone, so that an existing build (CPU or CUDA, from any index) is kept. Modules are compiled
# when they are first imported: compiling all of them takes longer than all else.
$(VENV)/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c "$$NEEDED_PYTHON"
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt torch==2.13.0
	$(BIN)/python -m pip install -q --no-compile -c constraints.txt -e '.[dev]'
	touch $@

demo: install ## Run the whole pipeline on the example batches, with two small real models
	$(BIN)/python examples/demo.py

ui: install ## Open the pipeline in the Dagster UI on 127.0.0.1 (PORT=3000)
	$(BIN)/qaq ui --port $(PORT)

test: install ## Run the fast tests in two processes, without network or GPU
	$(BIN)/python -m pytest -m "not slow and not gpu" -n 2 --dist worksteal

# pyenv's shim of an interpreter works only if its version is selected.
test-pythons: ## Run the fast tests on each installed Python of PYTHONS, each in its own environment
	@tested=; for python in $(PYTHONS); do \
		selected=$$(pyenv latest "$${python#python}" 2>/dev/null || true); \
		export PYENV_VERSION="$${selected:-$(PYENV_VERSION)}"; \
		if ! $$python -c "" 2>/dev/null; then echo "== $$python: not installed, skipped"; continue; fi; \
		echo "== $$python"; tested="$$tested $$python"; \
		$(MAKE) --no-print-directory test PYTHON=$$python VENV=$(VENV)-$$python || exit 1; \
	done; \
	test -n "$$tested" || { echo "None of $(PYTHONS) is installed." >&2; exit 1; }; \
	echo "== passed:$$tested"

test-slow: install ## Run the slow tests: real models (fetched first), a killed run, the UI in a browser
	$(BIN)/python examples/fetch_models.py
	$(BIN)/python -m pytest -m "slow and not gpu"

# LLaMA-Factory pins older libraries than this project, so it has its own environment.
test-consumers: install ## Load the exports with datasets, TRL and LLaMA-Factory (installs LLaMA-Factory, 1 GB)
	test -x $(VENV)-llama-factory/bin/python || $(PYTHON) -m venv $(VENV)-llama-factory
	$(VENV)-llama-factory/bin/python -m pip install -q llamafactory==0.9.5
	QAQ_LLAMA_FACTORY=$(abspath $(VENV))-llama-factory/bin/python $(BIN)/python -m pytest qaq_pipeline_tests/publication/test_consumers.py

bench: install ## Measure the scoring engine against its goals and real opponents (40 min; installs lm-eval)
	$(BIN)/python -m pip install -q -c constraints.txt -e '.[dev,bench]'
	$(BIN)/python -m bench

# The three places share the time: 1/2, 1/3 and 1/6 of it.
CHAOS_SECONDS ?= 3600

chaos: install ## Disturb the pipeline at random for an hour (CHAOS_SECONDS=3600; needs the right to mount)
	$(BIN)/python -m qaq_pipeline_tests.chaos --seconds $$(($(CHAOS_SECONDS) / 2))
	$(BIN)/python -m qaq_pipeline_tests.chaos --seconds $$(($(CHAOS_SECONDS) / 3)) --servers
	$(BIN)/python -m qaq_pipeline_tests.chaos --seconds $$(($(CHAOS_SECONDS) / 6)) --workers

docs: install ## Generate pages from the code and build the site in docs/_build/html, warnings as errors
	$(BIN)/python -m docs.generate
	$(BIN)/python -m sphinx -q -W --keep-going -b html -d docs/_build/doctrees docs docs/_build/html
	@echo "docs/_build/html/index.html"

docs-links: install ## Check every external link of the site (needs the network)
	$(BIN)/python -m sphinx -q -b linkcheck -d docs/_build/doctrees docs docs/_build/links

pictures: install ## Take the screenshots of the documentation again, in `chromium`
	shots=$$(mktemp -d) && trap 'rm -rf "$$shots"' EXIT && \
	QAQ_SCREENSHOTS="$$shots" $(BIN)/python -m pytest -q qaq_pipeline_tests/end_to_end/test_ui_audit.py && \
	for picture in docs/pictures/*.png; do cp "$$shots/$${picture##*/}" docs/pictures/; done

check: install ## Check lint, format, types, import contracts and definitions
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/pyrefly check
	$(BIN)/lint-imports --no-logo
	$(MAKE) --no-print-directory check-definitions

.PHONY: check-definitions
check-definitions: install
	home=$$(mktemp -d) && trap 'rm -rf "$$home"' EXIT && cp qaq_pipeline/dagster.yaml "$$home"/ && \
	DAGSTER_HOME="$$home" $(BIN)/dg check defs

format: install ## Format the code and apply automatic fixes
	$(BIN)/ruff check --fix
	$(BIN)/ruff format

clean: ## Remove caches and build outputs; keep var/ and the virtual environment
	rm -rf build dist docs/_build .pytest_cache .ruff_cache .import_linter_cache .hypothesis .coverage htmlcov
	find qaq_pipeline qaq_pipeline_tests examples docs -name __pycache__ -type d -exec rm -rf {} +
