# Everything a fresh machine needs is set up here: only Python 3.11 or newer, make and a package index are assumed.
PYTHON ?= python3
VENV ?= .venv
BIN = $(VENV)/bin
export TRAJLM_CACHE ?= $(CURDIR)/.cache

# accelerate gives each process one thread unless told otherwise.
THREADS ?= $(shell getconf _NPROCESSORS_ONLN)

DEMO ?= runs/demo
DEMO_STAYS ?= 4000
DEMO_RECIPE ?= recipes/demo.yaml

.PHONY: demo test test-vision lint clean

# The whole pipeline on an invented ICU. Interrupted and repeated, it resumes.
demo: $(BIN)/.core
	$(BIN)/trajlm fetch smollm2-135m
	$(BIN)/trajlm synthesize --layout mimic-iv --stays $(DEMO_STAYS) --seed 0 --out $(DEMO)/raw
	$(BIN)/trajlm prepare --config $(DEMO_RECIPE) --raw $(DEMO)/raw --out $(DEMO)/prepared
	$(BIN)/python pretrain.py --config $(DEMO_RECIPE) --data $(DEMO)/prepared --out $(DEMO)/encoders
	$(BIN)/accelerate launch --num_processes 1 --num_machines 1 --mixed_precision no --dynamo_backend no \
	    --num_cpu_threads_per_process $(THREADS) \
	    finetune.py --config $(DEMO_RECIPE) --data $(DEMO)/prepared --encoders $(DEMO)/encoders --out $(DEMO)/sequence
	$(BIN)/python interpret.py --run $(DEMO)/sequence --out $(DEMO)/report
	@echo "The report: $(CURDIR)/$(DEMO)/report/index.html (open it in a browser; it needs no network)"

# A file of tests stays on one worker, whose fixtures it shares; each worker computes on one thread.
test: $(BIN)/.dev lint
	OMP_NUM_THREADS=1 POLARS_MAX_THREADS=2 $(BIN)/python -m pytest -n auto --maxprocesses 4 --dist loadfile --no-loadscope-reorder

# Image models of open_clip and timm, in an environment of their own: the torchvision that they need breaks transformers
# where the index holds only one that was built for CUDA. Once it is made, `make test` runs these checks too.
VISION = .venv-vision
VISION_PYTHON = $(VISION)/bin/python

test-vision: $(VISION)/.ready
	OMP_NUM_THREADS=1 HF_HUB_OFFLINE=1 PYTHONPATH=tests/vision:tests:. $(VISION_PYTHON) -m pytest tests/vision/check_image_towers.py

$(VISION)/.ready: pyproject.toml constraints.txt
	test -x $(VISION_PYTHON) || $(PYTHON) -m venv $(VISION)
	$(VISION_PYTHON) -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev,vision]'
	touch $@

lint: $(BIN)/.dev
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# One pip command: left to itself, a range would pull a newer torch with gigabytes of CUDA libraries.
$(BIN)/.core: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e .
	touch $@

$(BIN)/.dev: pyproject.toml constraints.txt
	test -x $(BIN)/python || $(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --disable-pip-version-check -c constraints.txt -e '.[dev]'
	touch $(BIN)/.core $@

clean:
	rm -rf runs .cache $(VENV) $(VISION)
