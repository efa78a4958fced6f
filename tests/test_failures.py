"""Warnings of a run that goes wrong: each planted fault is named once, a healthy run by nothing."""

from __future__ import annotations

import math
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

from datasets.storage import InMemoryDataset
from diffusion import PROCESSES, build_process
from diffusion.process import LOSSES, PREDICTIONS, WEIGHTINGS
from tests.test_train import run, state_of
from training import failures
from training.failures import FailureWatch, measure, trivial_losses
from training.objective import QUARTILES
from utils.checkpoint import load_checkpoint
from utils.config import Config
from utils.errors import EXIT_OK, exit_code_of
from utils.images import to_uint8

STD, T = 0.6, 4
ROOT = Path(__file__).resolve().parent.parent
SYMPTOMS = ("images hardly vary", "loss has risen", "nothing is learnt")
SYMPTOMS += ("previews are empty", "previews are noise or a grid")


def process_of(process: str, **settings):
    return build_process(Config(process=process, num_timesteps=T, **settings))


def mean_answer(process):
    """The network that answers as if x_0 were the mean of the data, 0, and eps that of noise."""
    return lambda x_t, t, y: process.target(torch.zeros_like(x_t), t, torch.zeros_like(x_t))


def measured(process, network, count: int = 4000):
    """The loss at each t on white images, (T,)."""
    generator = torch.Generator().manual_seed(0)
    x_0, noise = torch.randn(2, T, 1, 1, count, generator=generator, dtype=torch.float64)
    return process.loss(network, STD * x_0, None, torch.arange(T), noise)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("predicted", "space"), list(product(PREDICTIONS, PREDICTIONS)))
def test_the_trivial_loss_is_that_of_the_best_constant(process, predicted, space):
    ours = process_of(process, prediction_type=predicted, loss_space=space)
    expected, actual = measured(ours, mean_answer(ours)), trivial_losses(ours, STD)
    torch.testing.assert_close(actual, expected, rtol=0.1, atol=1e-9)
    shifted = measured(ours, lambda *x: mean_answer(ours)(*x) + 0.1)
    assert (shifted > expected).all()


@pytest.mark.parametrize(("kind", "weighting"), list(product(LOSSES, WEIGHTINGS)))
def test_the_trivial_loss_is_of_the_kind_and_weight_of_the_run(kind, weighting):
    ours = process_of("ddpm", loss_type=kind, loss_weighting=weighting, noise_scale=2.0)
    expected = measured(ours, mean_answer(ours))
    torch.testing.assert_close(trivial_losses(ours, STD), expected, rtol=0.1, atol=1e-9)


# --- the watch alone


def watch_of(*, patch_size=1, images=None, told=None, **settings) -> FailureWatch:
    if images is None:
        images = smooth(64)
    config = Config(**{"num_timesteps": 100, **settings})
    dataset = InMemoryDataset(to_uint8(images), torch.zeros(len(images), dtype=torch.int64), [])
    resume = None if told is None else SimpleNamespace(state={"failures": told})
    parts = dict(process=build_process(config), model=SimpleNamespace(patch_size=patch_size))
    return FailureWatch(SimpleNamespace(config=config, dataset=dataset, resume=resume, **parts))


def smooth(count: int, size: int = 16) -> torch.Tensor:
    """Images of broad blobs, (count, 1, size, size) in [-1, 1]."""
    coarse = torch.rand(count, 1, 4, 4, generator=torch.Generator().manual_seed(1)) * 2 - 1
    return nn.functional.interpolate(coarse, size=(size, size), mode="bilinear")


def report(watch, step, factor, rate=None):
    """A log line whose quartiles are `factor` times the trivial losses."""
    losses = {name: factor * loss for name, loss in watch._trivial.items()}
    rate = watch._rate if rate is None else rate
    means = {"train/loss": factor, "train/loss_smoothed": factor, "train/lr": rate}
    watch.take_losses(step, means | losses)


def test_a_loss_that_was_never_below_the_trivial_one_is_told_once(caplog):
    watch = watch_of(learning_rate=1e-7)
    for step in (1, 50, 100, 150, 200, 250):
        report(watch, step, 1.1)
    (line,) = caplog.messages
    assert line.startswith("step 150: nothing is learnt: 1.10 times")
    assert "learning_rate=1e-07" in line


def test_a_network_is_not_judged_before_its_warm_up(caplog):
    watch = watch_of(learning_rate=1e-3)
    for step in range(50, 5000, 50):
        report(watch, step, 1.1, rate=1e-3 * step / 1e5)
    assert not caplog.messages
    for step in range(5000, 5200, 50):
        report(watch, step, 1.1)
    assert len(caplog.messages) == 1


def test_quartiles_without_an_example_and_one_good_one_are_no_fault(caplog):
    watch = watch_of()
    losses = {name: math.nan for name in QUARTILES} | {
        QUARTILES[2]: 0.5 * watch._trivial[QUARTILES[2]]
    }
    means = {"train/loss": 1.0, "train/loss_smoothed": 1.0, "train/lr": watch._rate}
    for step in range(50, 500, 50):
        watch.take_losses(step, means | losses)
    assert not caplog.messages


def test_a_loss_far_above_its_best_is_told(caplog):
    watch = watch_of()
    for step, loss in ((1, 1), (50, 0.2), (100, 0.1), (150, 0.25), (200, 0.4), (250, 5)):
        report(watch, step, loss)
    (line,) = caplog.messages
    assert line.startswith("step 200: loss has risen: 0.4 from 0.1; lower learning_rate")


def test_a_resumed_run_does_not_tell_again_and_judges_what_it_sees(caplog):
    watch = watch_of(told=["nothing is learnt"])
    report(watch, 1000, 1.1)
    assert not caplog.messages
    assert watch_of(told=[]).told == []


@pytest.mark.parametrize(
    ("drawn", "symptom"),
    {
        "grey": (torch.zeros(16, 1, 16, 16), "previews are empty"),
        "one image": (smooth(1).expand(16, -1, -1, -1), "previews are empty"),
        "black": (smooth(16).sign() * 0 - 1, "previews are empty"),
        "noise": (torch.rand(16, 1, 16, 16) * 2 - 1, "previews are noise or a grid"),
        "seams": (
            smooth(16) / 3 + torch.tensor([0.6, -0.6]).repeat_interleave(8),
            "noise or a grid",
        ),
        "good": (smooth(96)[64:], None),
        "one": (smooth(1), None),
    }.values(),
)
def test_previews_are_judged_beside_the_data(drawn, symptom, caplog):
    watch = watch_of(patch_size=8)
    for _ in range(2):
        watch.take_samples(drawn)
    assert not caplog.messages, "nobody is judged that early"
    report(watch, 200, 0.5)
    for _ in range(3):
        watch.take_samples(to_uint8(drawn))
    assert len(caplog.messages) == (symptom is not None)
    assert all(symptom in line for line in caplog.messages)


def test_previews_that_get_less_noisy_are_given_time(caplog):
    watch = watch_of(patch_size=2)
    report(watch, 200, 0.5)
    for share in (1.0, 0.8, 0.6):
        watch.take_samples(share * (torch.rand(16, 1, 16, 16) * 2 - 1))
    assert not caplog.messages


def test_the_seam_of_patches_counts_alone():
    """Differences inside patches do not: the same images have more of them at other borders."""
    images = torch.zeros(2, 1, 8, 8)
    images[..., 4:] = 0.5
    across = measure(images, 4)[2] - measure(torch.zeros(2, 1, 8, 8), 4)[2]
    assert float(across) == pytest.approx(0.5**2 / 2)
    assert float(measure(images, 3)[2]) == pytest.approx(1e-3)


# --- planted in runs


DIT = dict(hidden_size=64, depth=2, num_heads=2)
OWN_NETWORK = """
import torch
from torch import nn


class Blind(nn.Module):
    def __init__(self, img_size, in_channels, num_classes=0, **sizes):
        super().__init__()
        self.table = nn.Parameter(torch.zeros(1000, in_channels, 1, 1))

    def forward(self, x_t, t, y=None):
        return self.table[t].expand_as(x_t)
"""


def fault(**settings):
    return dict(model_type="dit", model_params=DIT | dict(patch_size=4)) | settings


PLANTED = {
    "tiny rate": (fault(learning_rate=1e-7), "nothing is learnt", "learning_rate=1e-07"),
    "x_t is not used": (
        fault(model_type="networks:Blind", model_params={}),
        "nothing is learnt",
        "whether x_t is used",
    ),
    "wrong range": (
        fault(
            dataset="custom",
            data_root="floats",
            use_subdirs=False,
            image_channels=1,
            value_range=(0, 255),
        ),
        "images hardly vary",
        "value_range",
    ),
}
SLOWLY = {
    "huge rate": (fault(learning_rate=0.1), "nothing is learnt", "learning_rate=0.1"),
    "large patches predict noise": (
        fault(model_params=DIT | dict(patch_size=8), prediction_type="eps"),
        "previews are noise or a grid",
        "patch_size",
    ),
}


def warnings_of_run(monkeypatch, capsys, folder, **settings) -> list[str]:
    """The lines of a run of digits of 16 pixels that name a symptom."""
    monkeypatch.chdir(folder)
    config = dict(dataset="digits", image_size=16, conditional=False, batch_size=64)
    config |= dict(
        beta_schedule="cosine",
        prediction_type="v",
        num_timesteps=100,
        num_inference_steps=4,
        num_samples=8,
    )
    config |= dict(learning_rate=1e-3, sample_interval=1, save_interval=1000, log_interval=10)
    Path("config.py").write_text(f"config = {config | settings!r}", encoding="utf-8")
    assert exit_code_of(lambda: run("config.py", "a")) == EXIT_OK
    lines = capsys.readouterr().out.splitlines()
    return [line for line in lines if any(symptom in line for symptom in SYMPTOMS)]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """Where there are a network and images of one's own."""
    (tmp_path / "networks.py").write_text(OWN_NETWORK, encoding="utf-8")
    (tmp_path / "floats").mkdir()
    draws = np.random.default_rng(0).random((40, 16, 16)).astype(np.float32)
    for i, image in enumerate(draws):
        np.save(tmp_path / "floats" / f"{i:02d}.npy", image)
    return tmp_path


@pytest.mark.parametrize(("settings", "symptom", "key"), PLANTED.values(), ids=list(PLANTED))
def test_a_planted_fault_is_named(settings, symptom, key, monkeypatch, capsys, folder):
    """In fewer steps than are fair, as no healthy network is there to be wronged."""
    monkeypatch.setattr(failures, "FAIR_STEPS", 15)
    options = dict(max_steps=20, batch_size=16, sample_start_epoch=1000)
    lines = warnings_of_run(monkeypatch, capsys, folder, **settings, **options)
    assert any(symptom in line and key in line for line in lines)
    assert len(lines) == 1
    assert state_of("a")["failures"] == [symptom]


@pytest.mark.slow
@pytest.mark.ci
@pytest.mark.parametrize(
    ("settings", "symptom", "key"),
    (PLANTED | SLOWLY).values(),
    ids=[*PLANTED, *SLOWLY],
)
def test_a_planted_fault_is_named_within_200_steps(
    settings, symptom, key, monkeypatch, capsys, folder
):
    lines = warnings_of_run(monkeypatch, capsys, folder, **settings, max_steps=200)
    assert any(symptom in line and key in line for line in lines)


@pytest.mark.slow
@pytest.mark.ci
def test_a_healthy_run_is_told_nothing(monkeypatch, capsys, folder):
    assert not warnings_of_run(monkeypatch, capsys, folder, **fault(), max_steps=200)


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("name", ["unet", "flow", "dit", "jit", "dim", "superres"])
def test_shipped_configs_raise_no_alarm(name, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    given = [
        "max_steps=226",
        "use_scheduler=false",
        "sample_interval=2",
        "num_inference_steps=10",
        "num_samples=20",
    ]
    assert run(ROOT / "configs" / f"digits_{name}.py", "a", *given) == EXIT_OK
    text = capsys.readouterr().out
    assert not [symptom for symptom in SYMPTOMS if symptom in text]
    assert load_checkpoint(Path("checkpoints/a/current_model.pth"))["failures"] == []
