# make quickstart   from a clean clone to a trained adapter: a virtual environment, the pinned packages, one run
# make test         ruff, mypy and all tests in the same environment
# make nightly      exported adapters executed in mlx-lm and llama.cpp, which it installs (llama.cpp builds for 15 minutes)
# make soak         a server under load for MINUTES=30, adapters coming and going, one request in ten hostile
# make faults       kills, damage, full disks and power cuts at every file operation; LORA_TUNE_CORPUS has the injector
#
# Needs Python 3.11 or newer with pip, and nothing else. pip's own settings (PIP_INDEX_URL, PIP_FIND_LINKS …) hold. A
# torch that the chosen PYTHON already has is used; else the pinned one is installed before anything can ask for another.
# On Linux without a GPU, PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu saves about 2 GB of CUDA libraries.

VENV ?= .venv
CONSTRAINTS ?= constraints/tested.txt
WORKERS ?= 2
CANDIDATES := python3 python3.11 python3.12 python3.13 python
PYTHON ?= $(shell for p in $(CANDIDATES); do $$p -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null && echo $$p && break; done)
BIN := $(VENV)/$(if $(filter Windows_NT,$(OS)),Scripts,bin)
PY := $(BIN)/python
PIP := $(PY) -m pip install --quiet

export TOKENIZERS_PARALLELISM := false

.DELETE_ON_ERROR:
.PHONY: quickstart test coverage nightly faults soak lint typecheck example-adapter wheel clean

quickstart: $(VENV)/.installed
	$(PY) -m lora_tune.run recipes/quickstart.yaml --overwrite

# mypy needs one core for a minute: the tests begin beside it
test: lint
	@$(PY) -m mypy >$(VENV)/types.txt 2>&1 & types=$$!; \
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile; tested=$$?; \
	wait $$types; typed=$$?; cat $(VENV)/types.txt; exit $$((tested + typed))

# the same tests, and the lines that none of them runs
coverage: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m pytest -n $(WORKERS) --dist loadfile --cov --cov-report=term-missing

# what other engines make of exported adapters; LORA_TUNE_ENGINES_REQUIRED fails what would be skipped without them
nightly: $(VENV)/.installed-test
	$(PIP) -c $(VENV)/constraints.txt -e '.[nightly]'
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 LORA_TUNE_ENGINES_REQUIRED=1 $(PY) -m pytest -m nightly
	$(PY) -m benchmarks.export_parity

# every fault of tests/faults at every file operation of a run (half an hour); goes on where it was interrupted
faults: $(VENV)/.installed-test
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 $(PY) -m tests.faults.grid --workers $(WORKERS)

# half an hour of everything at once against a real server; writes benchmarks/results/soak.md
soak: $(VENV)/.installed-test
	HF_HUB_OFFLINE=1 $(PY) -m benchmarks.soak --minutes $(or $(MINUTES),30)

lint: $(VENV)/.installed-test
	$(PY) -m ruff check .

typecheck: $(VENV)/.installed-test
	$(PY) -m mypy

# a committed copy of the quickstart's run, so that `adapters verify` has something to verify in a fresh clone
example-adapter: $(VENV)/.installed
	$(PY) -m lora_tune.run recipes/quickstart.yaml output=adapters/example --overwrite
	rm -rf adapters/example/checkpoints

wheel: $(VENV)/.installed
	$(PY) -m pip wheel --no-deps --wheel-dir dist .

clean:
	rm -rf $(VENV) dist build .mypy_cache .ruff_cache .pytest_cache .hypothesis

# torch first and alone, at its pinned version, so that no other package can pull in another one.
$(VENV)/.torch: $(CONSTRAINTS)
	@test -n "$(PYTHON)" || { echo "no Python 3.11 or newer found; name one: make PYTHON=/path/to/python3.12" >&2; exit 2; }
	$(PYTHON) -m venv $(VENV)
	$(PYTHON) constraints/own_torch.py $(VENV) $(CONSTRAINTS)
	$(PIP) -c $(VENV)/constraints.txt torch
	@touch $@

$(VENV)/.installed: $(VENV)/.torch pyproject.toml
	$(PIP) -c $(VENV)/constraints.txt -e .
	@touch $@

$(VENV)/.installed-test: $(VENV)/.torch pyproject.toml
	$(PIP) -c $(VENV)/constraints.txt -e '.[test]'
	@touch $@ $(VENV)/.installed
