"""editing/mathematics.py: what is known of morphs, noised pictures, holes and inversion holds, to
the last bit where it should."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from diffusion import SAMPLERS, SCHEDULES, Prediction, Process, timestep_grid
from diffusion.ddim import ddim
from diffusion.ddpm import ddpm
from diffusion.guidance import Denoiser
from diffusion.schedules import levels_of_betas
from editing.from_pictures import box_mask
from editing.mathematics import (
    Waypoint,
    blend,
    ddim_invert,
    frames_along,
    keep_known,
    last_timesteps,
    resampling,
    slerp,
)
from utils.errors import ConfigError
from utils.images import to_float, to_uint8

DIFFUSION = Process(levels_of_betas(SCHEDULES["cosine"](1000, 0.0, 0.0)))
GRID = timestep_grid(1000, 10, "trailing")
STD = 0.5


def gaussian(mean: Tensor | float = 0.0, std: float = STD) -> Denoiser:
    """The best denoiser of pixels that are independently N(mean, std^2)."""

    def denoise(x_t: Tensor, t: int) -> Prediction:
        a = DIFFUSION.levels(t)[0] ** 2
        variance = a * std**2 + 1 - a
        x_0 = mean + std**2 * a**0.5 / variance * (x_t - a**0.5 * mean)
        return Prediction(x_0, (x_t - a**0.5 * x_0) / (1 - a) ** 0.5)

    return denoise


def normals(seed: int = 0):
    generator = torch.Generator().manual_seed(seed)
    return lambda like: torch.randn(like.shape, generator=generator)


def noise(count: int, seed: int = 0) -> Tensor:
    return normals(seed)(torch.empty(count, 1, 4, 4))


def last(steps) -> Tensor:
    return list(steps)[-1].x


# --- the mathematics


def test_slerp_has_exact_ends_and_keeps_the_length():
    a, b = noise(64), noise(64, seed=1)
    assert torch.equal(slerp(a, b, torch.zeros(64)), a)
    assert torch.equal(slerp(a, b, torch.ones(64)), b)
    unit = [x / x.flatten(1).norm(dim=1).reshape(-1, 1, 1, 1) for x in (a, b)]
    lengths = slerp(*unit, torch.linspace(0, 1, 64)).flatten(1).norm(dim=1)
    torch.testing.assert_close(lengths, torch.ones(64))
    east, north = torch.eye(2).reshape(2, 1, 2)
    half = slerp(east, north, torch.tensor([1 / 3]))
    torch.testing.assert_close(half, torch.tensor([[3**0.5 / 2, 1 / 2]]))
    torch.testing.assert_close(slerp(a, a, torch.linspace(0, 1, 64)), a)


def test_blended_predictions_are_those_of_the_blended_scores():
    """p^(1 - w) q^w of two Gaussians of one variance is the Gaussian at the mixed mean."""
    x, weight = noise(5), torch.tensor([0.0, 0.25, 0.5, 0.9, 1.0])
    first, second = gaussian(-1.0), gaussian(2.0)
    mixed = blend(first, second, weight)(x, 400)
    expected = gaussian(torch.lerp(torch.tensor(-1.0), torch.tensor(2.0), weight.view(5, 1, 1, 1)))
    for found, wanted in zip(mixed, expected(x, 400), strict=True):
        torch.testing.assert_close(found, wanted)
    for found, a, b in zip(mixed, first(x, 400), second(x, 400), strict=True):
        assert torch.equal(found[0], a[0])
        assert torch.equal(found[-1], b[-1])


def test_frames_share_the_stops():
    stops = [Waypoint(3, label) for label in (0, 5, 2)]
    frames = frames_along(stops, 4)
    assert [round(f.weight, 3) for f in frames] == [0, 0.333, 0.667, 1, 0.333, 0.667, 1]
    assert [f.end.label for f in frames] == [5, 5, 5, 5, 2, 2, 2]


def test_strength_is_the_share_of_steps():
    assert last_timesteps(GRID, 1.0) == GRID
    assert last_timesteps(GRID, 0.6) == GRID[4:]
    assert last_timesteps(GRID, 0.001) == GRID[-1:]
    for strength in (0.0, -1.0, 1.01, float("nan")):
        with pytest.raises(ConfigError, match="strength"):
            last_timesteps(GRID, strength)


@pytest.mark.parametrize("name", SAMPLERS)
def test_known_pixels_stay_and_unknown_ones_are_sampled(name):
    """To the last of 256 grey levels; with nothing known, to the last bit a plain sample."""
    levels = torch.arange(256, dtype=torch.uint8).reshape(16, 1, 4, 4)
    x_0, x_T = to_float(levels), noise(16)
    denoise, sampler = gaussian(), SAMPLERS[name].run

    def drawn(unknown: Tensor) -> Tensor:
        known = keep_known(denoise, DIFFUSION, x_0, unknown)
        return last(sampler(known, x_T, DIFFUSION, GRID, normals(2)))

    plain = last(sampler(denoise, x_T, DIFFUSION, GRID, normals(2)))
    box = box_mask([0, 0, 2, 4], 4, 4)
    found = drawn(box)
    assert torch.equal(to_uint8(found)[..., 2:], levels[..., 2:])
    assert torch.equal(found[..., :2], plain[..., :2])  # pixels of this model are independent
    assert torch.equal(drawn(box_mask([0, 0, 4, 4], 4, 4)), plain)
    assert torch.equal(to_uint8(drawn(torch.zeros(1, 4, 4, dtype=torch.bool))), levels)


def test_on_the_way_known_pixels_are_draws_of_the_forward_process():
    x_0, x_T = torch.full((5000, 1, 4, 4), 0.7), noise(5000)
    nothing = torch.zeros(1, 4, 4, dtype=torch.bool)
    for sampler in (ddim, ddpm):
        steps = sampler(
            keep_known(gaussian(), DIFFUSION, x_0, nothing), x_T, DIFFUSION, GRID, normals(3)
        )
        for t, x, _ in steps:
            a = DIFFUSION.levels(t)[0] ** 2
            assert float(x.mean()) == pytest.approx(a**0.5 * 0.7, abs=0.02)
            assert float(x.std()) == pytest.approx((1 - a) ** 0.5, abs=0.02)


def test_resampling_once_is_the_sampler_itself():
    for sampler in (ddim, ddpm):
        plain = last(sampler(gaussian(), noise(4), DIFFUSION, GRID, normals()))
        once = last(resampling(sampler, 1)(gaussian(), noise(4), DIFFUSION, GRID, normals()))
        assert torch.equal(plain, once)


def test_resampling_brings_what_is_drawn_in_line_with_what_is_known():
    """RePaint's point. Two pixels of correlation 0.9, one known to be 1: the other one's mean is
    0.9. Plain replacement remains far below, every repetition comes nearer."""
    covariance = torch.tensor([[1.0, 0.9], [0.9, 1.0]])

    def denoise(x_t: Tensor, t: int) -> Prediction:
        a = DIFFUSION.levels(t)[0] ** 2
        gain = a**0.5 * covariance @ torch.linalg.inv(a * covariance + (1 - a) * torch.eye(2))
        times = torch.full((len(x_t),), t)
        return DIFFUSION.with_x_0(x_t @ gain.T, x_t, times)

    x_0, unknown = torch.tensor([[[[1.0, 0.0]]]]).repeat(4000, 1, 1, 1), torch.tensor([False, True])
    known = keep_known(denoise, DIFFUSION, x_0, unknown)
    means = []
    for times in (1, 3, 9):
        x = last(resampling(ddpm, times)(known, normals(1)(x_0), DIFFUSION, GRID, normals()))
        means.append(float(x[..., 1].mean()))
    assert means == sorted(means)
    assert means[0] < 0.65
    assert means[2] == pytest.approx(0.9, abs=0.1)


def errors_of_inversion(num_steps: int, iterations: int) -> tuple[float, float]:
    """RMSE of x_T against the ODE's own solution, and of the pictures sampled from it."""
    grid = timestep_grid(1000, num_steps, "trailing")
    x_0 = STD * noise(64)
    a = DIFFUSION.levels(grid[0])[0] ** 2
    exact = x_0 / STD * (a * STD**2 + 1 - a) ** 0.5  # x / std(x) stays what it is along the ODE
    x_T = last(ddim_invert(gaussian(), x_0, DIFFUSION, grid, iterations=iterations))
    back = last(ddim(gaussian(), x_T, DIFFUSION, grid, normals()))
    return tuple(float((a - b).square().mean().sqrt()) for a, b in ((x_T, exact), (back, x_0)))


def test_inversion_follows_the_ode_to_first_order():
    """Where the ODE is known: both errors halve when the steps are doubled."""
    coarse, fine = errors_of_inversion(40, 1), errors_of_inversion(80, 1)
    for many, few in zip(fine, coarse, strict=True):
        assert few / many == pytest.approx(2, abs=0.15)
    assert fine[1] < 0.005


def test_fixed_point_iterations_undo_the_sampler_whatever_the_steps():
    errors = [errors_of_inversion(5, iterations)[1] for iterations in (1, 2, 4, 12)]
    assert all(later < earlier / 4 for earlier, later in pairwise(errors))
    assert errors[-1] < 1e-6


def test_boxes():
    assert box_mask([1, 0, 3, 2], 4, 5)[0].int().tolist() == [[0, 1, 1, 0, 0]] * 2 + [[0] * 5] * 2
    for box in ([0, 0, 4], [2, 0, 2, 4], [0, 0, 6, 4], [0, 3, 2, 1]):
        with pytest.raises(ConfigError, match="give x0,y0,x1,y1"):
            box_mask(box, 4, 5)
