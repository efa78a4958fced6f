# `make demo` and `make test` need nothing but Python 3.11+ and make; they set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
DEMO := checkpoints/demo

.PHONY: demo test lint faults gpu clean

.venv/.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# Draw digits from weights/, in seconds; then train on the embedded digits, draw a grid and a GIF,
# evaluate: minutes on a CPU.
demo: .venv/.installed
	$(BIN)/python sample.py --checkpoint weights/mnist_unet.safetensors --output_name mnist_unet
	$(BIN)/python train.py --config configs/digits_unet.py experiment_name=demo resume_path=auto
	$(BIN)/python sample.py --checkpoint $(DEMO) --create_gif --output_dir $(DEMO)/demo
	$(BIN)/python evaluate.py --checkpoint $(DEMO)
	@echo
	@echo "A picture of a model in weights/, which nobody had to train: samples/mnist_unet.png"
	@echo "Everything else is in $(DEMO):"
	@echo "  picture     $(DEMO)/demo/samples.png"
	@echo "  animation   $(DEMO)/demo/samples.gif"
	@echo "  evaluation  $(DEMO)/eval/report.html, report.json"
	@echo "  weights     $(DEMO)/best_model.pth"
	@echo "  training    $(DEMO)/metrics.jsonl, $(DEMO)/samples/"

test: .venv/.installed
	$(BIN)/python -m pytest -n auto

lint: .venv/.installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

# Kill, stop, starve and mislead real training runs, and count what is lost.
# FAULTS=--quick takes two minutes, FAULTS="--only 1,4" some rows; see docs/reliability.md.
faults: .venv/.installed
	OMP_NUM_THREADS=1 $(BIN)/python -m tests.faults --json checkpoints/faults.json $(FAULTS)

# What only an NVIDIA GPU can show, in GPU_MINUTES; docs/performance.md says more. PARTS chooses some
# of it, DATA="dataset=custom data_root=FOLDER" trains on own images. GPU_PYTHON=python3 takes that
# Python as it is, without .venv; wheels of what it lacks may lie in the folder GPU_WHEELS.
GPU_PYTHON := $(BIN)/python
GPU_MINUTES ?= 14
PARTS ?= tests speed peers cifar10
GPU_RESULTS ?= checkpoints/gpu.jsonl
.venv/.gpu: .venv/.installed benchmarks/requirements.txt
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt -c constraints.txt
	touch $@
gpu: $(if $(filter $(BIN)/python,$(GPU_PYTHON)),.venv/.gpu)
	set -e; packages=$$(mktemp -d); trap 'rm -rf "$$packages"' EXIT; \
	$(if $(GPU_WHEELS),$(GPU_PYTHON) -m pip install --quiet --no-index --no-deps \
	  --target "$$packages" $(GPU_WHEELS)/*.whl;) \
	GPU_PACKAGES="$$packages" PYTHONPATH="$$packages" $(GPU_PYTHON) -m benchmarks.gpu \
	  --minutes $(GPU_MINUTES) --parts $(PARTS) --results $(GPU_RESULTS) \
	  $(if $(DATA),--data "$(DATA)") $(GPU_OPTIONS)

# The environment and caches; never checkpoints.
clean:
	rm -rf .venv .pytest_cache .ruff_cache
