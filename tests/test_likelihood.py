"""The likelihood of images, against that of data whose exact denoiser is known."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

import diffusion.likelihood
import evaluate
import metrics.likelihood
import train
from datasets import build_dataset
from diffusion import build_process, timestep_grid
from diffusion.likelihood import log_likelihood
from tests.conftest import ROOT
from utils.config import Config
from utils.errors import EXIT_OK
from utils.labels import save_images

DIGITS = str(ROOT / "configs" / "digits_unet.py")

PROCESSES = {
    "cosine": dict(beta_schedule="cosine", prediction_type="v"),
    "linear": dict(),
    "flow": dict(process="flow", prediction_type="x_0", noise_scale=2.0),
    "edm": dict(process="edm", prediction_type="v"),
}
MEAN = torch.linspace(-0.3, 0.3, 64, dtype=torch.float64).reshape(1, 8, 8)
STD = torch.linspace(0.05, 0.6, 64, dtype=torch.float64).flip(0).reshape(1, 8, 8)


@pytest.mark.parametrize("keys", PROCESSES.values(), ids=PROCESSES)
def test_gaussian_data_have_their_density(keys):
    """Independent pixels of means and deviations of their own; the error falls with the square of
    the step, and is below 1 % of the bits per dimension at 50 steps."""
    process = build_process(Config(**keys))

    def model(x_t, t, y):
        signal, noise = (torch.tensor(level, dtype=torch.float64) for level in process.levels(t[0]))
        gain = signal * STD**2 / (signal**2 * STD**2 + noise**2)
        x_0 = MEAN + gain * (x_t - signal * MEAN)
        return process.target(x_0, t, (x_t - signal * x_0) / noise)

    generator = torch.Generator().manual_seed(0)
    z = torch.randn(16, 1, 8, 8, dtype=torch.float64, generator=generator)
    exact = (-(z**2) / 2 - (STD * math.sqrt(2 * math.pi)).log()).flatten(1).sum(1)
    probes = torch.randint(0, 2, z.shape, generator=generator).double() * 2 - 1
    errors = {}
    for steps in (25, 50):
        grid = timestep_grid(1000, steps, "log_snr", half_log_snr=process.half_log_snr)
        found = log_likelihood(process, model, MEAN + STD * z, None, probes, sorted(grid))
        errors[steps] = float((found - exact).abs().max()) / 64 / math.log(2)
    bits = float(-exact.mean()) / 64 / math.log(2) + math.log2(127.5)
    assert errors[50] < 0.01 * bits
    assert errors[50] < 0.4 * errors[25]


def test_the_estimate_of_a_divergence_has_the_right_mean():
    """Of a linear model that mixes pixels the trace is known; probes give it on average."""
    process, generator = build_process(Config(prediction_type="x_0")), torch.Generator()
    matrix = torch.randn(16, 16, dtype=torch.float64, generator=generator.manual_seed(0)) / 8

    def model(x_t, t, y):
        return (x_t.flatten(1) @ matrix).reshape(x_t.shape)

    images = torch.zeros(2000, 1, 4, 4, dtype=torch.float64)
    probes = torch.randint(0, 2, images.shape, generator=generator).double() * 2 - 1
    steps = [400, 401]
    sampled = log_likelihood(process, model, images, None, probes, steps)
    one = torch.eye(16, dtype=torch.float64).reshape(16, 1, 4, 4) * 4  # whose mean is the trace
    exact = log_likelihood(process, model, images[:16], None, one, steps).mean()
    error = sampled.std() / math.sqrt(len(sampled))
    assert abs(float(sampled.mean() - exact)) < 4 * float(error)


def test_evaluate_reports_bits_and_those_of_each_image(tiny, monkeypatch, capsys):
    """Real digits are likelier than noise, whatever images are drawn; the same again by batches."""
    monkeypatch.setattr(metrics.likelihood, "NUM_IMAGES", 6)
    monkeypatch.setattr(diffusion.likelihood, "NUM_TIMESTEPS", 12)
    options = ["max_steps=8", "learning_rate=5e-3", "beta_schedule=cosine", "prediction_type=v"]
    assert train.main(["--config", str(tiny), *options]) == EXIT_OK
    arguments = ["--checkpoint", "checkpoints/tiny", "--n", "2", "--steps", "2"]
    arguments += ["--metrics", "nll", "--output", "out"]

    def measure() -> tuple[dict, list[str]]:
        assert evaluate.main(arguments) == EXIT_OK
        report = json.loads(Path("out/report.json").read_text())
        return report["metrics"]["nll"], Path("out/report_nll.csv").read_text().splitlines()

    found, rows = measure()
    assert found["status"] == "ok"
    assert (found["n"], found["split"], found["forwards"]) == (6, "test", 22)
    values = [float(row.split(",")[1]) for row in rows[1:]]
    assert len(values) == 6
    assert found["value"] == pytest.approx(sum(values) / 6, abs=1e-5)
    assert 0 < found["value"] < 9  # evenly distributed levels have 8
    monkeypatch.setattr(metrics.likelihood, "BATCH", 4)
    again, _ = measure()
    assert again["value"] == pytest.approx(found["value"], rel=1e-4)
    assert "bits per value, +-" in capsys.readouterr().out


@pytest.mark.slow
def test_bits_of_each_image_tell_digits_from_what_is_none(tiny, monkeypatch):
    """Of unseen digits against the same with their pixels shuffled, turned, or in negative, and
    against drawn shapes, which are simpler than digits: those take more than 200 steps. The mean of
    the pixels does not tell the first two."""
    monkeypatch.setattr(metrics.likelihood, "NUM_IMAGES", 64)
    monkeypatch.setattr(diffusion.likelihood, "NUM_TIMESTEPS", 20)
    options = ["conditional=false", "max_steps=1500", "learning_rate=3e-3", "use_scheduler=true"]
    options += ["beta_schedule=cosine", "prediction_type=v", "model_params.dropout=0"]
    options += ["ema_decay=0.99", "save_interval=1000", "log_interval=500"]
    assert train.main(["--config", str(tiny), *options]) == EXIT_OK
    arguments = ["--checkpoint", "checkpoints/tiny", "--n", "2", "--steps", "2", "--metrics", "nll"]

    def bits(name: str, *more: str) -> torch.Tensor:
        assert evaluate.main([*arguments, "--output", name, *more]) == EXIT_OK
        rows = Path(name, "report_nll.csv").read_text().splitlines()[1:]
        assert len(rows) == 64
        return torch.tensor([float(row.split(",")[1]) for row in rows])

    dataset, of_digits = build_dataset(Config(image_size=(8, 8)), "test"), bits("digits")
    digits = torch.stack([dataset[i][0] for i in range(64)])
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(64, 64, generator=generator).argsort(1)
    shuffled = digits.flatten(1).gather(1, order).reshape(digits.shape)
    others = {"shuffled": shuffled, "turned": digits.rot90(1, (2, 3)), "negative": 255 - digits}
    drawn = build_dataset(Config(dataset="synthetic", image_size=(8, 8)), "train")
    colours = torch.stack([drawn[i][0] for i in range(0, len(drawn), len(drawn) // 64)][:64])
    others["shapes"] = colours.float().mean(1, keepdim=True).round().byte()
    for name, images in others.items():
        save_images(Path(f"{name}_images"), images, None)
        of_others = bits(name, "--reference", f"{name}_images")
        auc = (of_others[:, None] > of_digits).float().mean()
        assert auc > 0.9, name


def test_pictures_have_no_likelihood_without_a_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_images(Path("pictures"), torch.zeros(3, 1, 16, 16, dtype=torch.uint8), None)
    assert (
        evaluate.main(["--images", "pictures", "--config", DIGITS, "--metrics", "nll"]) == EXIT_OK
    )
    report = json.loads(Path("pictures_eval/report.json").read_text())
    assert report["metrics"]["nll"]["status"] == "skipped"
    assert "needs a model of 8-bit images" in report["metrics"]["nll"]["reason"]
