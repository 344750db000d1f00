# `make demo` runs the main job on real input, `make test` the tests; each sets up .venv by itself, once.
PYTHON ?= python3
export PYTHON
BIN := .venv/bin
LINT := $(BIN)/ruff check . && $(BIN)/ruff format --check . && $(BIN)/mypy
INPUTS := pyproject.toml constraints.txt scripts/setup.sh tests/environment/torchvision_beside_cpu_torch.py

.PHONY: demo test lint test-heavy test-browser setup bench gpu bench-materialize bench-loader bench-storage bench-workers study study-full study-gpu study-questions faults fuzz audit trainers docs clean

demo: .venv/.set-up-demo
	$(BIN)/entrodrop demo --out demo-out

# One worker more than there are processors, because some always wait; the linters run beside them. The tests' files lie
# in memory where there is room for them: they are small, many, and each waits for the disk.
test: setup
	@room=$$(df -Pk /dev/shm 2>/dev/null | awk 'NR == 2 {print $$4}'); \
	[ "$${room:-0}" -lt 8000000 ] || export TMPDIR=/dev/shm; \
	($(LINT)) & lint=$$!; \
	workers=$$($(BIN)/python -c "import os; print(1 + os.cpu_count())"); \
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -n $$workers --dist loadfile --no-loadscope-reorder --durations=25; \
	tests=$$?; wait $$lint && exit $$tests

lint: setup
	$(LINT)

# The tests that take minutes, which `make test` leaves out; the last results are in docs/architecture.md.
test-heavy: setup
	$(BIN)/python -m pytest -m heavy

# The tests that open pages in Chromium, which must be there (Debian: apt-get install chromium).
test-browser: setup
	$(BIN)/python -m pytest -m browser

# Commands that are killed, interrupted or refused by the system at exact calls, and single bytes changed in what they made;
# the last lines list each with its outcome. It needs a C compiler. The last results are in docs/architecture.md.
faults: setup
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "" tests/faults

# An hour of coverage-guided fuzzing of what reads outside data, with atheris in an environment of its own.
fuzz: setup
	$(BIN)/python -m venv --system-site-packages .venvs/fuzz
	$(BIN)/python -c "import site; print(f'import site; site.addsitedir({site.getsitepackages()[0]!r})')" > .venvs/fuzz-path
	cp .venvs/fuzz-path "$$(.venvs/fuzz/bin/python -c 'import site; print(site.getsitepackages()[0])')/project.pth"
	.venvs/fuzz/bin/python -m pip install --no-deps atheris
	PYTHONPATH=.:tests .venvs/fuzz/bin/python tests/faults/fuzz.py 3600 .venvs/fuzz-found

# What is known to be vulnerable among the packages of .venv, with pip-audit in an environment of its own.
audit: setup
	$(PYTHON) -m venv .venvs/audit
	.venvs/audit/bin/python -m pip install -q pip-audit
	echo jinja2==2.4.1 > .venvs/vulnerable
	if .venvs/audit/bin/pip-audit --disable-pip --no-deps -r .venvs/vulnerable; then echo "no advisories can be had"; exit 1; fi
	.venvs/audit/bin/pip-audit --path "$$($(BIN)/python -c 'import site; print(site.getsitepackages()[0])')"

setup: .venv/.set-up-test

.venv/.set-up-demo: $(INPUTS)
	scripts/setup.sh demo

.venv/.set-up-test: $(INPUTS)
	scripts/setup.sh test

.venv/.set-up-docs: $(INPUTS)
	scripts/setup.sh docs

# The study of docs/study.md. `study` repeats small bases and headline arms at the settings that were chosen, `study-full` every
# trial (DEVICE=cuda: minutes on a GPU; without one, days).
STUDY := study/out
AGAIN := --again study/results/code-1M.json
EACH := --models 1 --processes $(shell getconf _NPROCESSORS_ONLN)
study: setup
	$(BIN)/python -m study.prepare $(STUDY) --size 0.1M --size 0.3M --domain code $(AGAIN)
	for s in 0.1M 0.3M; do $(BIN)/python -m study.train $(STUDY)/arrays-code-$$s $(STUDY)/code-$$s.json $(EACH) $(AGAIN) || exit 1; done
	$(BIN)/python -m study.page --print $(STUDY)/code-0.1M.json $(STUDY)/code-0.3M.json

# The sets of questions: share of right answers, and of answers that end. Rate and sizes are those of study/PLAN.md.
QUESTIONS := --middle --rate 2e-3
study-questions: setup
	$(BIN)/python -m study.prepare $(STUDY) --size 0.3M --domain task --domain chat $(QUESTIONS)
	for d in task chat; do $(BIN)/python -m study.train $(STUDY)/arrays-$$d-0.3M $(STUDY)/$$d-0.3M.json $(EACH) $(QUESTIONS) || exit 1; done
	$(BIN)/python -m study.page --print $(STUDY)/task-0.3M.json $(STUDY)/chat-0.3M.json

# The headline arms with a model and rows of one's own: make study-gpu MODEL=DIR DATA=rows.jsonl (ARGS: study/own.py)
study-gpu: setup
	$(BIN)/python -m study.own $(MODEL) $(DATA) $(STUDY)/own $(ARGS)

FULL := --device $(or $(DEVICE),cpu)
study-full: setup
	$(BIN)/python -m study.prepare $(STUDY) --size 1M
	for d in code prose; do \
		$(BIN)/python -m study.train $(STUDY)/arrays-$$d-1M study/results/$$d-1M.json $(FULL) && \
		$(BIN)/python -m study.train $(STUDY)/arrays-$$d-1M study/results/$$d-1M-low.json --rates low --headline $(FULL) || exit 1; \
	done
	$(BIN)/python -m study.page

# How fast scoring is with each backend, beside other ways, and without a model; the last figures are in benchmarks/README.md.
bench: setup
	$(BIN)/python benchmarks/scoring.py vllm
	$(BIN)/python benchmarks/scoring.py transformers --vocabulary 32768
	$(BIN)/python benchmarks/feeding.py

# What a GPU does, and how much of it scoring with transformers uses; needs no network, and of this package's requirements
# only torch, transformers, pydantic and what they need. Without .venv it takes the environment of PYTHON.
gpu:
	PYTHONPATH=. $(or $(wildcard $(BIN)/python),$(PYTHON)) benchmarks/gpu.py

# How fast materialize and verify are, beside pyarrow reading and writing the same columns; takes some minutes and GB of disk.
bench-materialize: setup
	$(BIN)/python benchmarks/materialize.py

# How fast the loader makes masked rows, beside reading the same rows from files.
bench-loader: setup
	$(BIN)/python benchmarks/loader.py

# Bytes and time of each encoding of what is on disk, and what a second push sends.
bench-storage: setup
	$(BIN)/python benchmarks/storage.py

# How much more two workers score on two cores than one.
bench-workers: setup
	$(BIN)/python benchmarks/workers.py

# Real training with trainers that need environments of their own, made under .venvs/; `make test` leaves it out.
# The last results are in docs/trainers/README.md. TRAINERS="litgpt axolotl" runs some of them.
trainers: setup
	$(BIN)/python tests/trainers/prove.py $(TRAINERS)

# Renews what is generated, and builds the site into build/site; a broken link is an error.
docs: .venv/.set-up-docs
	$(BIN)/entrodrop schema --write schemas
	$(BIN)/python scripts/docs.py
	NO_MKDOCS_2_WARNING=1 $(BIN)/mkdocs build --strict

clean:
	rm -rf demo-out build dist .pytest_cache .mypy_cache .ruff_cache .hypothesis
