# Two commands matter: `make demo` runs the whole job on this machine, `make test` checks it.
# Both make .venv and install into it by themselves.

# The first interpreter found that this package supports; override with `make PYTHON=/path/to/python`.
PYTHON ?= $(shell for p in python3 python3.12 python3.11 python3.13; do \
	$$p -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] < (3, 14))' >/dev/null 2>&1 && echo $$p && break; done)
VENV := .venv
BIN := $(VENV)/bin
STAMP := $(VENV)/.installed
# evalscope pins old versions of what training uses new ones of: it gets an environment of its own.
EVAL := .venv-eval
EVAL_STAMP := $(EVAL)/.installed

.PHONY: demo test test-fast test-gpu check format clean eval-environment

demo: $(STAMP)
	$(BIN)/infir2 demo

test: $(STAMP) $(EVAL_STAMP) check
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu" -n 2 --dist loadfile

test-fast: $(STAMP)
	OMP_NUM_THREADS=1 $(BIN)/pytest -m "not gpu and not slow" -n 2 --dist loadfile

# Needs an NVIDIA GPU and an environment in which torch sees it.
test-gpu:
	python3 -m pytest -m gpu -n 4 tests/gpu

check: $(STAMP)
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/python -m mypy
	$(BIN)/pytest -q tests/unit/test_layering.py

format: $(STAMP)
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .

$(STAMP): pyproject.toml constraints.txt
	@test -n "$(PYTHON)" || { echo "infir2 needs Python 3.11, 3.12 or 3.13; set PYTHON=/path/to/python"; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet -c constraints.txt -e '.[dev]'
	touch $(STAMP)

eval-environment: $(EVAL_STAMP)

$(EVAL_STAMP): constraints-eval.txt
	$(PYTHON) -m venv $(EVAL)
	$(EVAL)/bin/python -m pip install --quiet -c constraints-eval.txt evalscope
	touch $(EVAL_STAMP)

clean:
	rm -rf $(VENV) $(EVAL) .pytest_cache .ruff_cache .mypy_cache
