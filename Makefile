# Everything a reader, a runner or a contributor needs. A bare `make` lists the targets.
PYTHON ?= python3
VENV ?= .venv
STAMP ?= $(VENV)/.llmops-ref-installed
DEMO_STAMP ?= $(VENV)/.llmops-ref-demo-installed
DEMO_EXTRAS ?= embedded,rag
WORKERS ?= 2
PORT ?= 8000
BIN := $(VENV)/bin
DOCS := _docs/index.html

.DEFAULT_GOAL := help
.NOTPARALLEL:
.PHONY: help demo test lab docs serve-docs export notebooks lint doctor clean

help: ## list the targets
	@awk -F ':[^#]*## ' '/^[a-z-]+:.*## / { printf "  make %-11s %s\n", $$1, $$2 }' Makefile

demo: $(DEMO_STAMP) ## set up, fetch the models, index the sample handbook, ask three questions
	@$(BIN)/llmops-ref fetch-models
	@$(BIN)/llmops-ref demo

test: $(STAMP) ## set up what is missing and run every test, chapters included
	@$(BIN)/llmops-ref fetch-models
	@$(BIN)/python -m pytest -n $(WORKERS) --dist loadfile --no-loadscope-reorder --nbval --nbval-current-env --nbval-sanitize-with .ci/nbval_sanitize.cfg nbs tests

lab: $(STAMP) ## open JupyterLab at the index, on this machine only
	@$(BIN)/jupyter lab --ip=127.0.0.1 nbs/index.ipynb

docs: $(STAMP) ## build the site into _docs/ and check its links
	@$(BIN)/python .ci/docs.py
	@$(BIN)/python .ci/check_docs.py

$(DOCS): $(STAMP)
	@$(MAKE) docs

serve-docs: $(DOCS) ## serve _docs/ on http://127.0.0.1:8000 (PORT=... for another port)
	@$(BIN)/python -m http.server --bind 127.0.0.1 --directory _docs $(PORT)

export: $(STAMP) ## write the modules of llmops_ref/ from the notebooks
	@$(BIN)/python .ci/notebooks.py export

notebooks: $(STAMP) ## run every chapter in place and clean it (MEASURE=1 measures timings again)
	@$(BIN)/llmops-ref fetch-models
	@$(BIN)/python .ci/notebooks.py run $(if $(MEASURE),--measure)

lint: $(STAMP) ## ruff, mypy --strict, and modules in step with their notebooks
	@$(BIN)/ruff check llmops_ref tests nbs .ci setup.py
	@$(BIN)/mypy
	@$(BIN)/python .ci/notebooks.py check

doctor: $(DEMO_STAMP) ## check Python, packages, models, disk and one real answer
	@$(BIN)/llmops-ref doctor

clean: ## remove what was built; the environment and the fetched models stay
	rm -rf _docs _proc build dist *.egg-info .pytest_cache .mypy_cache .ruff_cache .hypothesis nbs/nbdev.yml nbs/.last_checked
	find llmops_ref tests nbs .ci -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is installed when one of these files is newer than the last install, and not otherwise.
# The demo needs fewer packages than the tests and the tools, so it does not wait for the rest.
SOURCES := settings.ini setup.py pyproject.toml constraints.txt
PIP_INSTALL = $(BIN)/python -m pip install --disable-pip-version-check -c constraints.txt

define make_venv
@$(PYTHON) -c 'import sys; v = sys.version_info[:2]; sys.exit(0 if (3, 11) <= v <= (3, 13) else "llmops-ref needs Python 3.11, 3.12 or 3.13, and $(PYTHON) is %d.%d. Name another one: make PYTHON=python3.12" % v)'
@test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
endef

$(DEMO_STAMP): $(SOURCES)
	$(make_venv)
	$(PIP_INSTALL) -e ".[$(DEMO_EXTRAS)]"
	@touch $@

$(STAMP): $(SOURCES)
	$(make_venv)
	$(PIP_INSTALL) -e ".[all,dev]"
	@touch $@ $(DEMO_STAMP)
