# Every target sets itself up on a machine with Python 3.11 or newer and pip.
PYTHON ?= python3
BIN := .venv/bin
CONFIG ?= configs/demo.yaml

.PHONY: install demo test test-slow lint docs serve bench clean

install: .venv/.installed

.venv/.installed: pyproject.toml constraints.txt
	@$(PYTHON) -c 'import sys; sys.exit("Python 3.11 or newer is needed, this is %d.%d: make PYTHON=python3.11" % sys.version_info[:2] if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet --disable-pip-version-check --no-compile -c constraints.txt -e '.[dev]'
	@touch $@

demo: install
	$(BIN)/farm run --config $(CONFIG)

serve: install
	$(BIN)/farm serve --config $(CONFIG)

test: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest --numprocesses 2 --no-loadscope-reorder

test-slow: install
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m slow

lint: install
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

docs: install  # site/index.html; a link that leads nowhere is an error
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --quiet

bench: install
	$(BIN)/python bench/train.py
	$(BIN)/python bench/infer.py
	$(BIN)/python bench/cost.py

clean:
	rm -rf work
