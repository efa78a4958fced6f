"""A GPU simulated by tensors without values: what reads one, or mixes devices, raises at once."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion import SAMPLERS, build_process
from generation.run import Run
from generation.sampling import label_denoiser, sampling_from, steps_from
from models import BACKBONES, skeleton
from tests.test_counts import NUM_CLASSES, SPEC, make_trainer
from tests.test_models import SMALL
from training.trainer import Trainer
from utils.config import Config
from utils.distributed import Runtime

META = torch.device("meta")
VARIANTS = [(name, {}) for name in BACKBONES] + [("dim", {"mixer": "mamba2"})]
PAIRS = [(*variant, "ddim") for variant in VARIANTS] + [("dit", {}, name) for name in SAMPLERS]


class Generator(torch.Generator):
    device = META


@pytest.fixture(autouse=True)
def the_device_has_what_a_gpu_has(monkeypatch):
    """Fused optimizers, contexts without autocast, generators: torch knows none on this device."""
    adam = sys.modules["torch.optim.adam"]  # `torch.optim` deletes its name
    monkeypatch.setattr(adam, "_device_dtype_check_for_fused", lambda *_, **__: None)
    monkeypatch.setattr(torch, "autocast", lambda *_, **__: contextlib.nullcontext())
    for module in ("training.objective", "utils.rng"):
        monkeypatch.setattr(f"{module}.torch_generator", lambda *_, **__: Generator())


@pytest.fixture
def trainer_of(tmp_path) -> Callable[..., Trainer]:
    """A trainer of which all is on the device: images, model, average."""

    def make(name: str, params: dict[str, Any], **settings: Any) -> Trainer:
        params = {**SMALL[name], **params}
        config = Config(conditional=True, model_type=name, model_params=params)
        return make_trainer(tmp_path, Runtime(META), skeleton(config, SPEC).to(META), **settings)

    return make


def take_steps(trainer: Trainer, count: int) -> None:
    trainer.learner.network.train()
    examples = trainer.job.examples(0)
    for _ in range(count):
        trainer._train_step(next(examples))
        trainer.step += 1


@pytest.mark.parametrize(
    ("name", "params"), [*VARIANTS, ("dit", {"activation_checkpointing": True})]
)
def test_a_training_step_reads_nothing_and_stays_on_the_device(trainer_of, name, params):
    trainer = trainer_of(name, params, loss_weighting="min_snr")
    take_steps(trainer, 2)
    learner = trainer.learner
    for state in (learner.optimizer.state[p] for p in learner.parameters):
        assert {value.device for value in state.values()} == {META}
    assert all(p.device == META for p in learner.sampled_model.parameters())


@pytest.mark.parametrize("spoil", ["read", "mix"])
def test_a_step_that_reads_or_mixes_devices_is_noticed(trainer_of, spoil: str):
    trainer = trainer_of("dit", {})
    honest = trainer.job.process.loss

    def loss(*arguments: Any) -> Tensor:
        value = honest(*arguments)
        return value + (value.mean().item() if spoil == "read" else torch.ones(len(value)))

    trainer.job.process.loss = loss
    with pytest.raises(RuntimeError, match="meta"):
        take_steps(trainer, 1)


@pytest.mark.parametrize(("name", "params", "method"), PAIRS)
def test_guided_sampling_reads_nothing_and_stays_on_the_device(name, params, method: str):
    config = Config(
        conditional=True,
        model_type=name,
        model_params={**SMALL[name], **params},
        sampling_method=method,
        num_timesteps=20,
        num_inference_steps=3,
        cfg_scale=3.0,
        cfg_interval=(0.0, 0.7),
        cfg_rescale=0.5,
        threshold="dynamic",
    )
    run = Run(skeleton(config, SPEC).to(META).eval(), build_process(config), SPEC, config)
    sampling, x_T = sampling_from(config), torch.empty(NUM_CLASSES, *SPEC.shape, device=META)
    denoise = label_denoiser(run, range(NUM_CLASSES), sampling, META)
    with torch.inference_mode():
        steps = list(steps_from(run, denoise, x_T, sampling, lambda s: torch.empty(s, device=META)))
    assert {step.x.device for step in steps} == {META}
    assert len(steps) == 3
