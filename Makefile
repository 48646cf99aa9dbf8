# Every target makes its own virtual environment when there is none. Only Python 3.11 and make are assumed.
PYTHON ?= python3.11
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
OUT ?= runs/demo
DEPLOY_OUT ?= runs/deploy-demo
DEMO ?=
ONLY ?=
# A process a core, each with one thread: two threads in one process wait for each other.
TESTS := OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile

.PHONY: demo deploy-demo test check lint bench format lock clean help

help: ## List the targets
	@grep -hE '^[a-z-]+:.*## ' $(MAKEFILE_LIST) | sed 's/:.*## /\t/'

$(STAMP): pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[simulation,bids,dicom,pdf,dev]'
	touch $(STAMP)

demo: $(STAMP) ## Three simulated hospitals, phantoms, to a verified release in OUT (default runs/demo)
	$(BIN)/consilium simulate deploy/studies/demo.yaml --out $(OUT) $(DEMO)
	$(BIN)/consilium verify $(OUT)/release

deploy-demo: $(STAMP) ## A coordinator with its gateway and two hospitals as processes, killed and resumed, in runs/deploy-demo
	$(BIN)/python deploy/demo/run.py --out $(DEPLOY_OUT) $(DEMO)

test: $(STAMP) ## All tests
	$(TESTS)

check: lint ## What lint does, architecture, fast tests
	$(TESTS) -m "not slow"

lint: $(STAMP) ## Format, lint, strict types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

bench: $(STAMP) ## Benchmarks with peers in the same run: build/bench/*.json (ONLY=name for one)
	$(BIN)/python -m tests.benchmarks $(ONLY)

format: $(STAMP) ## Rewrite the code in our format
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

lock: ## Write constraints.txt from this environment (after a deliberate upgrade, from a fresh one)
	{ sed -n '/^#/p' constraints.txt; $(BIN)/python -m pip freeze --exclude-editable | sed 's/+cpu//'; } > constraints.new
	mv constraints.new constraints.txt

clean: ## Remove the virtual environment and what was built
	rm -rf $(VENV) build .mypy_cache .ruff_cache .pytest_cache
