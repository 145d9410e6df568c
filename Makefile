# Every target makes the virtual environment first where it is missing. PYTHON picks the interpreter (3.11 or newer).
PYTHON ?= python3
VENV   := .venv
BIN    := $(VENV)/bin
TASKS  := sentiment translation question_answering code_generation text_generation

.PHONY: demo test lint fmt bench adapters faults tiny datasets memory clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[dev]'
	touch $@

demo: $(VENV)/installed      ## train two adapters, compare, swap, merge (a few minutes)
	$(BIN)/python scripts/demo.py

test: $(VENV)/installed      ## the whole test suite but what is marked slow, gpu or faults
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow and not gpu and not faults" --numprocesses auto --dist loadfile

faults: $(VENV)/installed    ## every fault in training, merging and serving that the kit claims to survive (about 20 minutes)
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m faults
	OMP_NUM_THREADS=1 $(BIN)/python tests/faults/kill_run.py --json runs/faults.json

lint: $(VENV)/installed      ## formatting, lint rules, types
	$(BIN)/ruff format --check .
	$(BIN)/ruff check .
	$(BIN)/mypy

fmt: $(VENV)/installed       ## format and sort imports
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

bench: $(VENV)/installed     ## every benchmark that runs on a CPU, quickly
	for script in benchmarks/*.py; do $(BIN)/python $$script --quick || exit 1; done

adapters: $(VENV)/installed  ## train the five shipped adapters of `tiny` into adapters/, then score them
	for task in $(TASKS); do \
	  $(BIN)/python train.py configs/$$task.yaml --overwrite && \
	  $(BIN)/qlora-kit adapters add runs/$$task --replace || exit 1; \
	done
	$(BIN)/qlora-kit eval $(TASKS:%=--adapter %) --allow-code-execution

datasets: $(VENV)/installed  ## write datasets/ again (the same bytes)
	$(BIN)/python scripts/build_datasets.py

tiny: $(VENV)/installed      ## pretrain the embedded base again (about 50 minutes on two cores)
	$(BIN)/python scripts/build_tiny_base.py --work /tmp/qlora-kit-tiny

memory: $(VENV)/installed    ## write docs/memory.md and its plot again (the plot needs matplotlib)
	$(BIN)/python scripts/build_memory_doc.py

clean:                       ## remove the virtual environment and everything that runs wrote
	rm -rf $(VENV) runs merged
