# `make demo` and `make test` need nothing but Python 3.11+ and make; they set up .venv themselves.

PYTHON ?= python3
BIN := .venv/bin
DEMO := checkpoints/demo

.PHONY: demo test lint faults gpu clean

.venv/.installed: requirements.txt requirements-dev.txt constraints.txt
	$(PYTHON) -m venv .venv
	$(BIN)/python -m pip install --quiet -r requirements-dev.txt -c constraints.txt
	touch $@

# Train on the embedded digits, draw a grid and a GIF, evaluate. Minutes on a CPU.
demo: .venv/.installed
	$(BIN)/python train.py --config configs/digits_unet.py experiment_name=demo resume_path=auto
	$(BIN)/python sample.py --checkpoint $(DEMO) --create_gif --output_dir $(DEMO)/demo
	$(BIN)/python evaluate.py --checkpoint $(DEMO)
	@echo
	@echo "Everything is in $(DEMO):"
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

# What only an NVIDIA GPU can show: its tests, speed beside other packages, and a CIFAR-10 run of
# 10 million images with its evaluation. DATA="dataset=custom data_root=FOLDER" trains on own images.
GPU_RUN := checkpoints/gpu_cifar10
gpu: .venv/.installed
	$(BIN)/python -c 'import torch; torch.cuda.is_available() or exit("error: no CUDA device")'
	$(BIN)/python -m pip install --quiet -r benchmarks/requirements.txt -c constraints.txt
	$(BIN)/python -m pytest -m gpu
	mkdir -p checkpoints
	$(BIN)/python -m benchmarks.peers --device cuda --dtype bf16 --batch_size 128 --gflops 12 \
	  --channels_last --compile blocks --json checkpoints/gpu_peers.jsonl
	$(BIN)/python -m benchmarks.effects --device cuda --batch_size 128 \
	  --json checkpoints/gpu_effects.jsonl
	$(BIN)/python train.py --config configs/cifar10_unet.py experiment_name=gpu_cifar10 \
	  epochs=200 channels_last=true compile=blocks resume_path=auto $(DATA)
	$(BIN)/python sample.py --checkpoint $(GPU_RUN) --captions --output_dir $(GPU_RUN)/pictures
	$(BIN)/python evaluate.py --checkpoint $(GPU_RUN) --num_samples 10000 --compile blocks
	$(BIN)/python runs.py report $(GPU_RUN)

# The environment and caches; never checkpoints.
clean:
	rm -rf .venv .pytest_cache .ruff_cache
