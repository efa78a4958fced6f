"""DDPM, flow matching and EDM as one process: the published formulas, and every sampler's order."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from scipy import stats

import edit
import export
import sample
import train
from diffusion import (
    DENSITIES,
    PROCESSES,
    SAMPLERS,
    Prediction,
    Process,
    build_process,
    make_denoiser,
    timestep_grid,
)
from diffusion.process import LOSSES, PREDICTIONS, SMALLEST_DIVISOR
from diffusion.schedules import (
    SCHEDULES,
    SIGMA_DATA,
    SIGMA_MAX,
    SIGMA_MIN,
    Levels,
    flow_levels,
)
from editing.mathematics import ddim_invert, keep_known, resampling
from tests.test_diffusion import (
    ALONE,
    examples,
    last,
    make_diffusion,
    toy_model,
)
from utils.config import Config
from utils.errors import EXIT_OK, ConfigError
from utils.rng import Stream, torch_generator

T = 100
SPACINGS = ("trailing", "leading", "linspace", "log_snr")


def make(process="ddpm", num_timesteps=T, **settings):
    return build_process(Config(process=process, num_timesteps=num_timesteps, **settings))


def pictures(count=T):
    """x_0 and noise, float64, and every timestep."""
    x_0, noise = torch.randn(2, count, 2, 3, 4, dtype=torch.float64)
    return x_0.clamp(-1, 1), noise, torch.arange(count)


def close(actual, expected, tolerance=1e-10):
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance)


def grid_of(process, steps, spacing, **options):
    options["half_log_snr"] = process.half_log_snr
    return timestep_grid(process.num_timesteps, steps, spacing, **options)


# --- one process


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("noise_scale", [1.0, 2.0])
@pytest.mark.parametrize("prediction_type", PREDICTIONS)
def test_predict_inverts_target_in_float64(process, noise_scale, prediction_type):
    ours = make(process, prediction_type=prediction_type, noise_scale=noise_scale)
    x_0, noise, t = pictures()
    x_t = ours.q_sample(x_0, t, noise)
    prediction = ours.predict(ours.target(x_0, t, noise), x_t, t)
    close(prediction.x_0, x_0)
    close(prediction.eps, noise)
    for timestep in (0, T // 2, T - 1):
        signal, sigma = ours.levels(timestep)
        close(x_t[timestep], signal * x_0[timestep] + sigma * noise[timestep], 1e-12)
    assert ours.levels(-1) == (1.0, 0.0)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("num_timesteps", [2, 20_000])
def test_every_path_goes_from_image_to_noise(process, num_timesteps):
    ours = make(process, num_timesteps)
    assert (ours.half_log_snr.diff() < 0).all()
    if num_timesteps > 2:
        assert ours.levels(num_timesteps - 1)[0] < 0.05
    assert ours.levels(num_timesteps - 1)[1] <= 1


def test_v_is_the_derivative_of_the_path():
    """By differences along angle and tau, in which the two paths are parametrised."""
    x_0, noise, t = pictures(10_000)
    linear = make("flow", 10_000, prediction_type="v")
    close(linear.target(x_0, t, noise)[:-2], (noise - x_0)[:-2])
    trigonometric = make("ddpm", 10_000, prediction_type="v", beta_schedule="cosine")
    x = [trigonometric.q_sample(x_0[:1], time, noise[:1]) for time in t[4000:4003, None]]
    angle = [math.atan2(*trigonometric.levels(i)[::-1]) for i in (4000, 4002)]
    slope = (x[2] - x[0]) / (angle[1] - angle[0])
    close(trigonometric.target(x_0[:1], t[4001:4002], noise[:1]), slope, 1e-6)


def old_loss(config, model, x_0, t, noise):
    """As it was written when DDPM was the only process: float32 tables of float64 betas."""
    betas = SCHEDULES[config.beta_schedule](config.num_timesteps, 1e-4, 0.02)
    a = torch.cumprod(1 - betas, 0)
    table = torch.stack([a.sqrt(), (1 - a).sqrt()]).float()
    signal, sigma = table[:, t].reshape(2, -1, 1, 1, 1)
    output = model(signal * x_0 + sigma * noise, t, None).float()
    target = {"eps": noise, "x_0": x_0, "v": signal * noise - sigma * x_0}
    distance = LOSSES[config.loss_type](output, target[config.prediction_type], reduction="none")
    loss = distance.flatten(1).mean(1)
    if config.loss_weighting == "uniform":
        return loss
    signal, sigma = table[:, t]
    snr = (signal / sigma) ** 2
    weight = snr.clamp(max=config.min_snr_gamma)
    return (
        loss * {"eps": weight / snr, "x_0": weight, "v": weight / (snr + 1)}[config.prediction_type]
    )


@pytest.mark.parametrize("schedule", ["linear", "cosine", "quadratic"])
def test_old_configs_keep_their_loss_to_the_last_bit(schedule):
    x_0, noise = torch.randn(2, T, 3, 4, 4)
    kinds = itertools.product(PREDICTIONS, LOSSES, ("uniform", "min_snr"))
    for prediction_type, loss_type, loss_weighting in kinds:
        settings = dict(prediction_type=prediction_type, loss_weighting=loss_weighting)
        config = Config(num_timesteps=T, beta_schedule=schedule, loss_type=loss_type, **settings)
        ours = build_process(config).loss(toy_model, x_0, None, torch.arange(T), noise)
        assert torch.equal(ours, old_loss(config, toy_model, x_0, torch.arange(T), noise))


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("predicted", "space"), [*itertools.product(PREDICTIONS, PREDICTIONS)])
def test_nine_losses_differ_by_their_closed_form_weights(process, predicted, space):
    """All are a weight times the error d of x_0 as the network sees it: (signal / noise)^2 in eps,
    1 in x_0, 1 / noise^2 in v, with the one divisor that may vanish kept above 0.05."""
    ours = make(process, prediction_type=predicted, loss_space=space)
    x_0, noise, t = pictures()
    output = torch.randn_like(x_0)
    loss = ours.loss(lambda *_: output, x_0, None, t, noise)
    x_t = ours.q_sample(x_0, t, noise)
    d = (ours.predict(output, x_t, t).x_0 - x_0) * ours.scale
    signal, sigma = torch.tensor([ours.levels(i) for i in range(T)], dtype=torch.float64).T
    signal = signal / ours.scale
    weight = {"eps": (signal / sigma) ** 2, "x_0": torch.ones(T), "v": sigma**-2.0}[space]
    if predicted != space:
        divisor = {"eps": signal, "x_0": sigma, "v": torch.ones(T)}[predicted]
        weight = weight * (divisor / divisor.clamp(min=SMALLEST_DIVISOR)) ** 2
    close(loss, weight * d.square().flatten(1).mean(1), 1e-8)


def test_jit_s_recipe_is_its_published_loss():
    """Li and He 2025: z = (1 - tau) x + tau e, v = (x - z) / max(tau, 0.05) up to sign."""
    ours = make("flow", prediction_type="x_0", loss_space="v")
    x_0, noise, t = pictures()
    tau = ours._table[1].reshape(T, 1, 1, 1)
    z = (1 - tau) * x_0 + tau * noise
    output = toy_model(z, t, None)
    v, v_pred = ((x - z) / tau.clamp(min=0.05) for x in (x_0, output))
    loss = ours.loss(toy_model, x_0, None, t, noise)
    close(loss, (v - v_pred).square().flatten(1).mean(1))


def test_edm_is_its_published_preconditioning_and_loss():
    """Karras et al. 2022, table 1, in images: D(x; sigma) and the weighted loss."""
    ours = make("edm", 40, prediction_type="v")
    x_0, noise, t = pictures(40)
    ends = math.log(SIGMA_MIN), math.log(SIGMA_MAX)
    sigma = torch.linspace(*ends, 40, dtype=torch.float64).exp().reshape(-1, 1, 1, 1)
    total = sigma**2 + SIGMA_DATA**2
    c_skip, c_out = SIGMA_DATA**2 / total, sigma * SIGMA_DATA / total.sqrt()
    c_in, weight = total**-0.5, total / (sigma * SIGMA_DATA) ** 2
    y = x_0 + sigma * noise
    close(ours.q_sample(x_0, t, noise), c_in * y)
    output = toy_model(c_in * y, t, None)
    denoised = c_skip * y - c_out * output  # F is -v
    close(ours.predict(output, c_in * y, t).x_0, denoised)
    loss = ours.loss(toy_model, x_0, None, t, noise)
    close(loss, (weight * (denoised - x_0).square()).flatten(1).mean(1))
    assert ours.half_log_snr.exp().reciprocal().flatten().tolist() == pytest.approx(sigma.flatten())


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("space", PREDICTIONS)
def test_min_snr_is_one_weight_of_x_0_in_every_process(process, space):
    settings = dict(prediction_type=space, loss_weighting="min_snr", min_snr_gamma=3.0)
    ours = make(process, **settings)
    x_0, noise, t = pictures()
    output = torch.randn_like(x_0)
    loss = ours.loss(lambda *_: output, x_0, None, t, noise)
    x_t = ours.q_sample(x_0, t, noise)
    error = (ours.predict(output, x_t, t).x_0 - x_0).square().flatten(1).mean(1) * ours.scale**2
    weight = ((2 * ours.half_log_snr).exp() / ours.scale**2).clamp(max=3.0)
    close(loss, weight * error, 1e-8)


@pytest.mark.parametrize("process", PROCESSES)
def test_thresholds_bound_images_not_what_the_network_sees(process):
    """Huge outputs saturate at exactly the darkest and the brightest image."""
    for prediction_type in PREDICTIONS:
        ours = make(process, prediction_type=prediction_type)
        denoise = make_denoiser(ours, lambda x, t, y: 50 * torch.sign(x.roll(1, -1)), None)
        x = torch.randn(4, 1, 4, 4)
        x_0, eps = denoise(x, 50)
        assert x_0.abs().max() == 1
        close(ours.q_sample(x_0, torch.full((4,), 50), eps), x, 1e-5)


def test_levels_that_are_no_path_are_refused():
    *rows, scale = flow_levels(Config(num_timesteps=T))
    signal, noise, signal_rate, noise_rate = rows
    for levels, message in (
        ([row.float() for row in rows], "float64"),
        ([row.flip(0) for row in rows], "ever less signal"),
        ([signal, noise, signal_rate / 2, noise_rate], "must be 1 at every t"),
    ):
        with pytest.raises(ValueError, match=message):
            Process(Levels(*levels, scale))


# --- when training looks at which t


@pytest.mark.parametrize(
    ("settings", "distribution"),
    [
        (dict(timestep_sampling="uniform"), stats.uniform.cdf),
        (
            dict(timestep_sampling="logit_normal", timestep_mean=0.8, timestep_std=0.8),
            lambda u: stats.norm.cdf((torch.logit(torch.as_tensor(u)) - 0.8) / 0.8),
        ),
        (
            dict(timestep_sampling="shift", timestep_shift=3.0),
            lambda u: u / (3 - 2 * u),  # the inverse of u -> 3 u / (1 + 2 u)
        ),
        (
            dict(
                process="edm",
                timestep_sampling="lognormal",
                timestep_mean=-1.2,
                timestep_std=1.2,
            ),
            lambda u: stats.norm.cdf(
                (math.log(SIGMA_MIN) + u * math.log(SIGMA_MAX / SIGMA_MIN) + 1.2) / 1.2
            ),
        ),
    ],
)
def test_timesteps_have_their_density(settings, distribution):
    """Kolmogorov and Smirnov, each t spread over its share of the time."""
    config = Config(num_timesteps=1000, **settings)
    draw, process = DENSITIES[config.timestep_sampling], build_process(config)
    t = draw(process, config, 20_000, torch_generator(0, Stream.TIMESTEP, 0))
    assert t.dtype == torch.int64
    assert t.min() >= 0
    assert t.max() < 1000
    u = (t + torch.rand(len(t), dtype=torch.float64, generator=torch.manual_seed(0))) / 1000
    assert stats.kstest(u.numpy(), lambda x: distribution(x)).pvalue > 0.01


@pytest.mark.parametrize("name", DENSITIES)
def test_timesteps_are_a_function_of_seed_and_step(name):
    """The same for a resumed run and on each of two processes, and with T at its ends."""
    settings = dict(timestep_sampling=name, timestep_mean=-0.5, timestep_shift=3.0)
    whole, later = examples(count=3, **settings), examples(start_step=2, count=1, **settings)
    assert torch.equal(whole[2].t, later[0].t)
    parts = [examples(replace(ALONE, rank=r, world_size=2), **settings)[2].t for r in (0, 1)]
    assert torch.equal(whole[2].t, torch.cat(parts))
    for mean, most in ((-100.0, 0.0), (100.0, 1.0)):
        made = examples(count=1, num_timesteps=2, timestep_sampling=name, timestep_mean=mean)
        if name in ("logit_normal", "lognormal"):
            assert (made[0].t == most).all()


# --- samplers


def ideal(process, std=0.5, mean=0.0):
    """The exact denoiser of pixels that are N(mean, std^2)."""

    def denoise(x, t):
        signal, sigma = process.levels(t)
        gain = signal * std**2 / ((signal * std) ** 2 + sigma**2)
        x_0 = mean + gain * (x - signal * mean)
        return Prediction(x_0, (x - signal * x_0) / sigma)

    return denoise


def spread(process, t, std=0.5):
    """The standard deviation of x_t, to which every x_t of one ODE trajectory is in proportion."""
    signal, sigma = process.levels(t)
    return math.hypot(signal * std, sigma)


def error_at(process, name, grid, end, std=0.5):
    """How far, relatively, the sampler is from the exact solution once it has come to `end`."""
    x_T = torch.ones(1, dtype=torch.float64)
    steps = SAMPLERS[name].run(ideal(process, std), x_T, process, grid, None)
    (x,) = [step.x for step in steps if step.t == end]
    return abs(x.item() * spread(process, grid[0], std) / spread(process, end, std) - 1)


FINE = 20_000


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize(("name", "order"), [("ddim", 1), ("heun", 2), ("dpmpp_2m", 2)])
def test_orders_of_convergence(process, name, order):
    """On Gaussian data, whose ODE is solved, at a time where no step is a long one."""
    ours = make(process, FINE, beta_schedule="cosine")
    first, end = int(0.9 * FINE), int(0.1 * FINE)
    few, many = (
        error_at(ours, name, torch.linspace(first, end, n + 1).long().tolist(), end)
        for n in (40, 80)
    )
    assert math.log2(few / many) == pytest.approx(order, abs=0.1 * order)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [10, 20])
def test_second_order_is_no_worse_than_ddim_anywhere(process, spacing, steps):
    for schedule in ("linear", "cosine") if process == "ddpm" else ("linear",):
        ours = make(process, 1000, beta_schedule=schedule)
        grid = grid_of(ours, steps, spacing)
        for std in (0.5, 0.05):
            first, second = (error_at(ours, n, grid, -1, std) for n in ("ddim", "dpmpp_2m"))
            assert second < first


def test_a_grid_in_log_snr_keeps_fine_detail():
    """Data of deviation 0.05: evenly spaced steps lose most of it in the last jump."""
    for schedule in ("linear", "cosine"):
        ours = make("ddpm", 1000, beta_schedule=schedule)
        grids = (
            timestep_grid(1000, 20, s, half_log_snr=ours.half_log_snr)
            for s in ("trailing", "log_snr")
        )
        even, fine = (error_at(ours, "dpmpp_2m", grid, -1, 0.05) for grid in grids)
        assert even > 0.5
        assert fine < 0.02


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_recover_a_gaussian_with_every_process(process, name):
    ours = make(process, 1000, noise_scale=2.0, beta_schedule="cosine")
    generator = torch.Generator().manual_seed(0)
    x_T = torch.randn(20_000, 1, 1, 1, generator=generator)
    grid = timestep_grid(1000, 400 if name == "ddpm" else 100, "trailing")
    x = last(
        SAMPLERS[name].run(
            ideal(ours, 0.3, mean=0.4),
            x_T,
            ours,
            grid,
            lambda x: torch.randn(x.shape, generator=generator),
        )
    )
    assert x.mean().item() == pytest.approx(0.4, abs=0.02)
    assert x.std().item() == pytest.approx(0.3, abs=0.02)


def test_ddim_on_a_flow_is_euler():
    ours = make("flow", prediction_type="v")
    grid = timestep_grid(T, 20, "trailing")
    x_T = torch.randn(4, 1, 4, 4, dtype=torch.float64)
    denoise = make_denoiser(ours, toy_model, None, threshold="none")
    x = x_T
    for t, s in itertools.pairwise([*grid, -1]):
        tau = [ours.levels(i)[1] for i in (t, s)]
        x = x + (tau[1] - tau[0]) * toy_model(x, torch.full((4,), t), None)
    close(last(SAMPLERS["ddim"].run(denoise, x_T, ours, grid, None)), x, 1e-5)


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("ddim", "FlowMatchEulerDiscreteScheduler"), ("heun", "FlowMatchHeunDiscreteScheduler")],
)
def test_flows_equal_diffusers(name, theirs):
    diffusers = pytest.importorskip("diffusers")
    ours = make("flow", prediction_type="v")
    grid = timestep_grid(T, 10, "trailing")
    scheduler = getattr(diffusers, theirs)(T)
    scheduler.set_timesteps(10)
    # Their own grid begins and ends elsewhere; each evaluation of the model has a place in it.
    sigmas = [ours.levels(t)[1] for t in grid]
    if name == "heun":
        sigmas = [sigmas[0], *(s for s in sigmas[1:] for _ in "ab")]
        grid = [grid[0], *(t for t in grid[1:] for _ in "ab")]
    scheduler.sigmas = torch.tensor([*sigmas, 0.0])
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    x, timesteps = x_T, scheduler.timesteps
    assert len(timesteps) == len(grid)
    for t, their_t in zip(grid, timesteps, strict=True):
        output = toy_model(x, torch.full((4,), t), None)
        x = scheduler.step(output, their_t, x).prev_sample
    denoise = make_denoiser(ours, toy_model, None, threshold="none")
    unique = list(dict.fromkeys(grid))
    close(last(SAMPLERS[name].run(denoise, x_T, ours, unique, None)), x, 1e-4)


def test_ddim_equals_diffusers_euler_without_noise():
    """Their EulerDiscreteScheduler runs in x / signal; its model takes the scaled input."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.EulerDiscreteScheduler(T, 1e-4, 0.02, timestep_spacing="trailing")
    scheduler.set_timesteps(10)
    ours, grid = make("ddpm"), timestep_grid(T, 10, "trailing")
    assert scheduler.timesteps.long().tolist() == grid
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    x = x_T / ours.levels(T - 1)[0]
    for t in scheduler.timesteps:
        scaled = scheduler.scale_model_input(x, t)
        output = toy_model(scaled, torch.full((4,), int(t)), None)
        x = scheduler.step(output, t, x).prev_sample
    denoise = make_denoiser(ours, toy_model, None, threshold="none")
    close(last(SAMPLERS["ddim"].run(denoise, x_T, ours, grid, None)), x, 1e-4)


@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_old_configs_keep_their_bits(name):
    """As each step was written in products of alphas, when DDPM was the only process."""
    ours, a = make_diffusion("cosine"), {-1: 1.0}
    betas = SCHEDULES["cosine"](T, 1e-4, 0.02)
    a |= dict(enumerate(torch.cumprod(1 - betas, 0).tolist()))
    denoise, grid = make_denoiser(ours, toy_model, None), timestep_grid(T, 20, "trailing")
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    if name == "heun":
        pytest.skip("there was none")
    noises, x, before = torch.Generator().manual_seed(1), x_T, None
    for t, s in itertools.pairwise([*grid, -1]):
        (x_0, eps), alpha = denoise(x, t), a[t] / a[s]
        if name == "ddpm":
            x = (a[s] ** 0.5 * (1 - alpha) * x_0 + alpha**0.5 * (1 - a[s]) * x) / (1 - a[t])
            if s >= 0:
                std = ((1 - alpha) * (1 - a[s]) / (1 - a[t])) ** 0.5
                x = x + std * torch.randn(x.shape, generator=noises)
        elif name == "ddim":
            variance = 0.25 * (1 - a[s]) / (1 - a[t]) * (1 - alpha)
            x = a[s] ** 0.5 * x_0 + max(0.0, 1 - a[s] - variance) ** 0.5 * eps
            if variance > 0:
                x = x + variance**0.5 * torch.randn(x.shape, generator=noises)
        elif s < 0:
            x = x_0
        else:
            h = 0.5 * (math.log(a[s] / (1 - a[s])) - math.log(a[t] / (1 - a[t])))
            slope = x_0
            if before is not None:
                r = before[1] / h
                slope = (1 + 0.5 / r) * x_0 - 0.5 / r * before[0]
            x = ((1 - a[s]) / (1 - a[t])) ** 0.5 * x - a[s] ** 0.5 * math.expm1(-h) * slope
            before = x_0, h
    generator = torch.Generator().manual_seed(1)
    options = {"eta": 0.5} if name == "ddim" else {}
    steps = SAMPLERS[name].run(
        denoise, x_T, ours, grid, lambda x: torch.randn(x.shape, generator=generator), **options
    )
    assert torch.equal(last(steps), x)


@pytest.mark.parametrize("name", SAMPLERS)
def test_chains_that_lose_the_image_long_before_their_end_are_sampled(name):
    """10^5 steps of DDPM's betas: a_t is no double above 0 any more for a third of them."""
    ours = make("ddpm", 100_000, prediction_type="v")
    denoise = make_denoiser(ours, toy_model, None)
    for spacing in SPACINGS:
        steps = SAMPLERS[name].run(
            denoise, torch.randn(2, 1, 4, 4), ours, grid_of(ours, 10, spacing), torch.randn_like
        )
        assert last(steps).isfinite().all()


# --- grids


def test_trailing_is_that_of_lin_et_al():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing="trailing")
    for steps in range(1, 1001):
        scheduler.set_timesteps(steps)
        assert timestep_grid(1000, steps, "trailing") == scheduler.timesteps.tolist()[:steps]


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("shift", [1.0, 0.01, 5.0, 1000.0])
def test_grids_never_visit_a_timestep_twice(process, spacing, shift):
    for num_timesteps in (2, 60, 300):
        ours = make(process, num_timesteps, beta_schedule="cosine")
        for steps in range(1, num_timesteps + 1, 1 if num_timesteps < 100 else 13):
            grid = timestep_grid(
                num_timesteps, steps, spacing, shift=shift, half_log_snr=ours.half_log_snr
            )
            assert len(grid) == steps
            assert grid == sorted(set(grid), reverse=True)
            assert 0 <= grid[-1] <= grid[0] < num_timesteps


def test_a_shift_is_that_of_stable_diffusion_3():
    """Esser et al. 2024, eq. 23, as diffusers has it in sigma."""
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(1000, shift=3.0)
    sigma = [(t + 1) / 1000 for t in timestep_grid(1000, 10, "trailing", shift=3.0)]
    sigmas = torch.linspace(1, 0.1, 10)
    scheduler.set_timesteps(sigmas=sigmas.tolist())
    assert sigma == pytest.approx(scheduler.sigmas[:-1].tolist(), abs=1e-3)


# --- guidance


def guided(**options):
    x, y = torch.randn(3, 1, 8, 8, generator=torch.manual_seed(0)), torch.tensor([0, 1, 2])
    options = dict(threshold="none") | options
    return make_denoiser(make("flow", prediction_type="v"), toy_model, y, **options)(x, 50)


@pytest.mark.parametrize("scale", [0.0, 1.0, 2.5])
def test_the_model_without_labels_as_guide_is_cfg(scale):
    def null_branch(x, t, y):
        return toy_model(x, t, torch.full_like(y, -1))

    plain = guided(cfg_scale=scale, cfg_interval=(0.2, 0.8))
    ours = guided(cfg_scale=scale, cfg_interval=(0.2, 0.8), guide=null_branch)
    assert all(torch.equal(a, b) for a, b in zip(plain, ours, strict=True))


def test_a_guide_serves_models_without_classes():
    ours, x = make(), torch.randn(3, 1, 4, 4)

    def guide(x, t, y):
        return 0.5 * toy_model(x, t, y)

    denoise = make_denoiser(ours, toy_model, None, cfg_scale=3.0, threshold="none", guide=guide)
    times = torch.full((3,), 10)
    close(denoise(x, 10).eps, 2 * toy_model(x, times, None), 1e-6)


def test_rescaling_keeps_the_conditional_deviation():
    """Lin et al. 2023, eq. 15 and 16."""
    ours = make("flow", prediction_type="v")
    x, y, times = torch.randn(3, 1, 8, 8), torch.tensor([0, 1, 2]), torch.full((3,), 50)
    out_y, out_null = toy_model(x, times, y), toy_model(x, times, torch.full((3,), -1))
    guided_output = out_null + 4.0 * (out_y - out_null)
    options = dict(cfg_scale=4.0, threshold="none")
    for share in (1.0, 0.7, 0.0):
        denoise = make_denoiser(ours, toy_model, y, cfg_rescale=share, **options)
        x_0, eps = denoise(x, 50)
        ratio = out_y.std((1, 2, 3), keepdim=True) / guided_output.std((1, 2, 3), keepdim=True)
        expected = share * guided_output * ratio + (1 - share) * guided_output
        close(eps - x_0, expected, 1e-5)
        if share == 1.0:
            stds = [(output.std((1, 2, 3))) for output in (eps - x_0, out_y)]
            close(*stds, 1e-5)


# --- editing


@pytest.mark.parametrize("process", PROCESSES)
def test_inversion_undoes_ddim_with_every_process(process):
    ours = make(process, 1000, beta_schedule="cosine", noise_scale=1.5)
    grid = timestep_grid(1000, 10, "trailing")
    x_0 = torch.randn(16, 1, 4, 4, dtype=torch.float64) * 0.5
    *_, step = ddim_invert(ideal(ours), x_0, ours, grid, iterations=25)
    close(last(SAMPLERS["ddim"].run(ideal(ours), step.x, ours, grid, None)), x_0, 1e-5)


@pytest.mark.parametrize("process", PROCESSES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_known_pixels_stay_with_every_process(process, name):
    ours = make(process, noise_scale=2.0)
    x_0, x_T = torch.rand(8, 1, 4, 4) * 2 - 1, torch.randn(8, 1, 4, 4)
    known = keep_known(ideal(ours), ours, x_0, torch.tensor([True, False, True, False]))
    sampler = SAMPLERS[name].run
    if not SAMPLERS[name].multistep:
        sampler = resampling(sampler, 3)
    x = last(sampler(known, x_T, ours, timestep_grid(T, 10, "trailing"), torch.randn_like))
    close(x[..., 1::2], x_0[..., 1::2], 1e-3)


@pytest.mark.parametrize("process", PROCESSES)
def test_noising_again_is_the_forward_process(process):
    """RePaint's step back: with x_0 known, x_t before and after it is a draw of q(x_t | x_0)."""
    ours, seen = make(process, noise_scale=0.5), []
    grid = timestep_grid(T, 10, "trailing")

    def denoise(x, t):
        seen.append((t, x.mean().item(), x.std().item()))
        return ours.with_x_0(torch.full_like(x, 0.7), x, torch.full((len(x),), t))

    generator = torch.Generator().manual_seed(0)
    x_0 = torch.full((20_000, 1), 0.7)

    def randn_like(x):
        return torch.randn(x.shape, generator=generator)

    x_T = ours.q_sample(x_0, torch.full((20_000,), T - 1), randn_like(x_0))
    last(resampling(SAMPLERS["ddpm"].run, 2)(denoise, x_T, ours, grid, randn_like))
    assert [t for t, *_ in seen] == [t for t in grid for _ in "ab"][:-1]
    for t, mean, std in seen:
        signal, sigma = ours.levels(t)
        assert mean == pytest.approx(0.7 * signal, abs=0.03)
        assert std == pytest.approx(sigma, rel=0.03)


# --- all of it


@pytest.mark.parametrize("process", ["edm"])
def test_every_script_serves_every_process(tiny, process, capsys):
    """Trained, resumed, sampled with each sampler, edited; what diffusers cannot do is a line."""
    settings = [f"process={process}", "prediction_type=v", "timestep_sampling=lognormal"]
    command = ["--config", str(tiny), "--device", "cpu", "experiment_name=a", *settings]
    for max_steps in (2, 4):
        assert train.main([*command, "resume_path=auto", f"max_steps={max_steps}"]) == EXIT_OK
    assert "has no effect" not in capsys.readouterr().out
    checkpoint = ["--checkpoint", "checkpoints/a", "--device", "cpu"]
    for name in SAMPLERS:
        drawn = [*checkpoint, "--sampling_method", name, "--steps", "4", "--n", "4"]
        assert sample.main([*drawn, "timestep_spacing=log_snr", "cfg_rescale=0.7"]) == EXIT_OK
    real = ["--real_split", "test", "--n", "2"]
    for words in (["invert"], ["img2img"], ["inpaint", "--box", "0,0,4,8", "--resample", "2"]):
        assert edit.main([*words, *checkpoint, *real]) == EXIT_OK
    assert "mean error" in capsys.readouterr().out
    with pytest.raises(ConfigError, match=f"process='{process}'|model_channels"):
        export.main([*checkpoint, "--format", "diffusers", "--output", "a"])


@pytest.mark.parametrize(
    ("settings", "is_told"), [("beta_end=0.02", True), ("beta_schedule=cosine", False)]
)
def test_a_schedule_that_ends_before_noise_is_told(tiny, capsys, settings, is_told):
    assert train.main(["--config", str(tiny), "--device", "cpu", "--dry_run", settings]) == EXIT_OK
    told = capsys.readouterr().out
    assert ("t=99 keeps 0.60 of the image; raise beta_end" in told) == is_told
