"""What only a CUDA device can show: `python -m pytest -m gpu`."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from PIL import Image

from diffusion import build_process
from generation.run import Run
from generation.sampling import generate, sampling_from
from models import build_model, mamba
from tests.test_counts import SPEC, make_trainer
from tests.test_models import DROPOUT, SMALL
from tests.test_selective_scan import worst_error
from tests.test_triton_scan import inputs_of, results
from utils.config import Config
from utils.distributed import Runtime
from utils.errors import EXIT_OK

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
CUDA = torch.device("cuda")


def losses(run_dir) -> list[float]:
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    return [row["train/loss"] for row in rows if "train/loss" in row]


def test_no_step_waits_for_the_device(tmp_path):
    trainer = make_trainer(tmp_path, Runtime(CUDA))
    trainer.learner.network.train()
    examples = trainer.job.examples(0)

    def train(num_steps: int) -> None:
        for _ in range(num_steps):
            trainer._train_step(next(examples))
            trainer.step += 1

    train(2)  # which puts images and tables on the device
    torch.cuda.set_sync_debug_mode("error")
    try:
        train(3)
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("setting", ["compile=blocks", "compile=graphs", "channels_last=true"])
def test_bf16_run_goes_on_where_it_stopped(setting, tiny, script, tmp_path):
    def train(*more):
        command = ["--config", tiny, "--device", "cuda", "log_interval=1", setting, *more]
        done = script("train.py", *command)
        assert done.returncode == EXIT_OK, done.output
        return done.output

    said = train("experiment_name=whole", "max_steps=12")
    assert "bf16" in said or not torch.cuda.is_bf16_supported()
    train("experiment_name=parts", "max_steps=6")
    train("experiment_name=parts", "max_steps=12", "resume_path=auto")
    whole, parts = (losses(tmp_path / "checkpoints" / name) for name in ("whole", "parts"))
    np.testing.assert_allclose(parts, whole, rtol=0.02)


def test_images_are_those_of_the_cpu(tiny, script, tmp_path):
    assert script("train.py", "--config", tiny, "max_steps=12").returncode == EXIT_OK
    pictures = []
    for device in ("cpu", "cuda"):
        options = ["--device", device, "--output_dir", device, "precision=fp32"]
        done = script("sample.py", "--checkpoint", "checkpoints/tiny", *options)
        assert done.returncode == EXIT_OK, done.output
        pictures.append(np.asarray(Image.open(tmp_path / device / "samples.png"), dtype=int))
    assert abs(pictures[0] - pictures[1]).mean() < 1  # grey levels of 256; TF32 may move a few


@pytest.mark.parametrize(("name", "beside"), [("unet", "blocks"), ("dit", None), ("dim", None)])
def test_graphs_train_and_sample_as_without(name, beside, tmp_path):
    """Steps 1 and 2 warm up and record, the others replay. Beside `blocks` with dropout: a replay
    draws the masks of its own step."""
    params = {**SMALL[name], **(DROPOUT[name][0] if beside else {})}
    results = []
    for mode in (beside, "graphs"):
        folder = tmp_path / str(mode)
        folder.mkdir()
        config = Config(conditional=True, model_type=name, model_params=params)
        torch.manual_seed(0)
        trainer = make_trainer(folder, Runtime(CUDA), build_model(config, SPEC, CUDA), compile=mode)
        trainer.learner.network.train()
        examples, values = trainer.job.examples(0), []
        for _ in range(6):
            trainer._train_step(next(examples))
            trainer.step += 1
            values.append(trainer._grad_norm.item())
        model, frames = trainer.learner.model.eval(), {0: [], 2: []}
        more = dict(sampling_method="dpmpp_2m", num_inference_steps=4, cfg_scale=3.0)
        config = config.model_copy(update={**more, "precision": "fp32"})
        run, kept = Run(model, build_process(config), SPEC, config), dict(batch_size=4)
        kept |= dict(sampling=sampling_from(config), runtime=Runtime(CUDA), frames=frames)
        images = list(generate(run, range(10), [0, 1, 2, 0, 1, 2, 0, 1, 2, 0], **kept))
        images += [image for step in frames.values() for image in step]
        results.append((values, torch.cat(images).int()))
    (norms, images), (graph_norms, graph_images) = results
    np.testing.assert_allclose(graph_norms, norms, rtol=1e-5 if beside else 1e-2)
    assert (graph_images - images).abs().float().mean() < 1


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_gpus_train_as_one(strategy, tiny, script, tmp_path):
    for name, processes in (("one", 1), ("two", 2)):
        options = [f"experiment_name={name}", f"strategy={strategy}", "max_steps=10"]
        command = ["--config", tiny, *options, "log_interval=1", "precision=fp32"]
        done = script("train.py", *command, "model_params.dropout=0.0", processes=processes)
        assert done.returncode == EXIT_OK, done.output
    one, two = (losses(tmp_path / "checkpoints" / name) for name in ("one", "two"))
    np.testing.assert_allclose(two, one, rtol=0.02)


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sizes", [(1, 16, 1, 64), (366, 16, 1, 768), (300, 12, 30, 33)])
def test_the_triton_scan_is_ours_and_repeats_itself(sizes, bf16: bool):
    from models.triton_scan import gated_scan

    inputs = [t.cuda() for t in inputs_of(*sizes, batch=2)]
    if bf16:  # as autocast leaves them
        inputs = [t.bfloat16() if i in (1, 3, 4, 6) else t for i, t in enumerate(inputs)]
    once, again = (results(gated_scan, inputs) for _ in range(2))
    assert all(map(torch.equal, once, again))
    expected = results(mamba.gated_scan, [t.double() for t in inputs])
    assert worst_error(once, expected) < (3e-2 if bf16 else 1e-4)
