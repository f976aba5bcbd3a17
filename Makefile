# `make demo` and `make test` do all set-up by themselves, in a virtual environment of their own; the stamps in it keep
# a second run from installing again.

PYTHON ?= python3
VENV ?= .venv
BIN := $(VENV)/bin
# accelerate launch would give a CPU run a single thread.
export OMP_NUM_THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

.PHONY: demo test world gpu-check

# the trainer says at its end where the picture, the curves and the LoRA are
demo: $(VENV)/.installed
	$(BIN)/accelerate launch training/alignprop.py --config configs/alignprop/emoji.yaml

test: $(VENV)/.installed-dev
	$(BIN)/ruff check .
# small models gain nothing from threads; a file's tests share their fixtures, so they stay in one process
	OMP_NUM_THREADS=1 $(BIN)/python -m pytest -m "not slow" -n logical --maxprocesses 4 --dist loadfile

# A report that the owner of a GPU can send back; without a GPU, a sentence.
gpu-check: $(VENV)/.installed-dev
	$(BIN)/python tests/benchmarks/gpu_check.py

$(VENV)/.installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[tensorboard]'
	touch $@

$(VENV)/.installed-dev: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/pip install -e '.[dev]'
	touch $(VENV)/.installed $@

# Everything in alignkit/emoji/weights, from nothing or from where it stopped: hours on two cores.
world: $(VENV)/.installed
	$(BIN)/python training/emoji/tokenizer.py
	$(BIN)/python training/emoji/vae.py
	$(BIN)/python training/emoji/clip.py --role base
	$(BIN)/python training/emoji/unet.py
	$(BIN)/python training/emoji/judges.py --judge all
	for role in training monitor evaluator; do $(BIN)/python training/emoji/clip.py --role $$role || exit 1; done
	$(BIN)/alignkit evaluate world --save true
