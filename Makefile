# `make demo` runs the main job on real input, `make test` the tests; each sets up .venv by itself, once.
PYTHON ?= python3
export PYTHON
BIN := .venv/bin
INPUTS := pyproject.toml constraints.txt scripts/setup.sh

.PHONY: demo test setup bench docs clean

demo: .venv/.set-up-demo
	$(BIN)/entrodrop demo --out demo-out

test: setup
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy
	$(BIN)/python -m pytest

setup: .venv/.set-up-test

.venv/.set-up-demo: $(INPUTS)
	scripts/setup.sh demo

.venv/.set-up-test: $(INPUTS)
	scripts/setup.sh test

# How fast scoring with vLLM is, beside other ways; the last figures are in benchmarks/README.md.
bench: setup
	$(BIN)/python benchmarks/score_vllm.py

docs: setup
	$(BIN)/entrodrop schema --write schemas
	$(BIN)/python scripts/docs.py

clean:
	rm -rf demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
