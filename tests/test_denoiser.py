"""`load_denoiser`: a trained model as D(x, sigma), for solvers that know nothing of timesteps."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch

from diffusion import build_process, make_denoiser
from generation.denoiser import SigmaDenoiser, load_denoiser
from generation.run import Run
from models import build_model
from utils.config import Config
from utils.errors import ConfigError
from utils.images import ImageSpec

SPEC = ImageSpec(1, 8, 8, 10)
PARAMS = dict(hidden_size=16, depth=2, num_heads=2, patch_size=4)
ROWS = (0, 250, 999)
PROCESSES = {
    "ddpm": dict(beta_schedule="cosine", prediction_type="v"),
    "flow": dict(process="flow", prediction_type="x_0", noise_scale=2.0),
    "edm": dict(process="edm", prediction_type="v"),
}


def make_run(**keys) -> Run:
    config = Config(model_type="jit", model_params=PARAMS, conditional=True, **keys)
    torch.manual_seed(0)
    model = build_model(config, SPEC).requires_grad_(False)
    for parameter in model.parameters():  # some start at zero
        parameter.add_(0.1 * torch.randn_like(parameter))
    return Run(model.eval(), build_process(config), SPEC, config)


@pytest.mark.parametrize("keys", PROCESSES.values(), ids=PROCESSES)
@pytest.mark.parametrize("cfg_scale", [0.0, 1.0, 2.5])
def test_at_the_sigma_of_a_timestep_it_is_the_samplers_x_0(keys, cfg_scale):
    run, process = make_run(**keys), build_process(Config(**keys))
    D = SigmaDenoiser(run, cfg_scale=cfg_scale)
    y, image = torch.tensor([3, 7]), torch.rand(2, 1, 8, 8) * 2 - 1
    denoise = make_denoiser(run.process, run.model, y, cfg_scale=cfg_scale, threshold="none")
    for t in ROWS:
        signal, noise = process.levels(t)
        x = image + noise / signal * torch.randn_like(image)
        expected = denoise(signal * x, t).x_0
        scale = expected.abs().max()
        assert (D(x, noise / signal, y) - expected).abs().max() <= 1e-5 * scale
        # deepinv's range, and a sigma for each image
        halves = SigmaDenoiser(run, cfg_scale=cfg_scale, unit_range=True)
        sigmas = torch.full((2,), noise / signal / 2)
        assert (2 * halves((x + 1) / 2, sigmas, y) - 1 - expected).abs().max() <= 1e-4 * scale


def test_sigmas_are_matched_on_a_logarithmic_scale_and_each_image_has_its_own():
    D = SigmaDenoiser(make_run(process="edm", prediction_type="v"))
    assert D.sigma_range == pytest.approx((0.002, 80.0), rel=1e-6)
    x = torch.randn(3, 1, 8, 8)
    together = D(x, torch.tensor([0.1, 1.0, 1e9]))
    for row, sigma in enumerate((0.1, 1.0, 80.0)):
        assert torch.allclose(together[row : row + 1], D(x[row : row + 1], sigma), atol=1e-5)


def test_gradients_reach_the_image_and_no_weight():
    D = SigmaDenoiser(make_run(), cfg_scale=2.0)
    x = torch.randn(2, 1, 8, 8, dtype=torch.float64, requires_grad=True)
    D(x, 0.5).square().sum().backward()
    assert x.grad.isfinite().all()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is None for p in D.parameters())


def test_what_a_model_was_not_trained_for_is_one_line():
    with pytest.raises(ConfigError, match="condition='edges': D takes no pictures"):
        SigmaDenoiser(make_run(condition="edges"))
    with pytest.raises(ConfigError, match="cfg_scale=2: needs training with dropped labels; use 1"):
        SigmaDenoiser(make_run(cfg_dropout_prob=0.0), cfg_scale=2.0)


def test_it_solves_an_inverse_problem(tiny):
    """Loaded from a run, as a package for inverse problems would: DPS halves the misfit of a
    picture of half the resolution that the same steps without guidance have."""
    import train

    options = ["max_steps=8", "learning_rate=5e-3", "beta_schedule=cosine", "prediction_type=v"]
    train.main(["--config", str(tiny), *options])
    D = load_denoiser("checkpoints/tiny", unit_range=True)
    shrink = torch.nn.AvgPool2d(2)
    target = shrink(torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(1)))

    def solve(strength: float) -> float:
        generator = torch.Generator().manual_seed(0)
        sigmas = torch.logspace(1, -2, 25)
        x = sigmas[0] * torch.randn(4, 1, 8, 8, generator=generator)
        for sigma, following in pairwise(sigmas):
            x = x.detach().requires_grad_()
            clean = D(x, sigma)
            misfit = (shrink(clean) - target).flatten(1).norm(dim=1).sum()
            (gradient,) = torch.autograd.grad(misfit, x)
            x = clean + following * (x - clean) / sigma - strength * following * gradient
        with torch.no_grad():
            return float((shrink(D(x, sigmas[-1])) - target).square().mean())

    assert solve(3.0) < 0.5 * solve(0.0)
