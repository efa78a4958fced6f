"""The diffusion process and the samplers, by their identities and against diffusers."""

import math
from dataclasses import replace
from functools import partial

import pytest
import torch

from datasets.storage import InMemoryDataset
from diffusion import (
    SAMPLERS,
    SCHEDULES,
    Process,
    build_process,
    guidance,
    make_denoiser,
    timestep_grid,
)
from diffusion.ddim import ddim
from diffusion.ddpm import ddpm
from diffusion.dpm_solver import dpmpp_2m
from diffusion.guidance import threshold_x_0
from diffusion.schedules import levels_of_betas
from training.objective import training_examples
from utils.config import Config
from utils.distributed import Runtime
from utils.labels import NULL_LABEL
from utils.rng import NOISE_BLOCK, Stream, torch_generator

T = 100


def make_diffusion(schedule="linear", num_timesteps=T, **options):
    return Process(levels_of_betas(SCHEDULES[schedule](num_timesteps, 1e-4, 0.02)), **options)


def toy_model(x, t, y):
    """Deterministic, depends on every input, and is bounded."""
    shift = 0.0 if y is None else (y.float() + 2)[:, None, None, None] * 0.1
    return torch.tanh(x * 0.7 + shift + t.float()[:, None, None, None] / T)


def zeros_like_noise(x):
    return torch.zeros_like(x)


def last(steps):
    *_, step = steps
    return step.x


# --- schedules


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("num_timesteps", [2, 300, 1000])
def test_schedules_are_valid_chains(name, num_timesteps):
    betas = SCHEDULES[name](num_timesteps, 1e-4, 0.02)
    assert betas.shape == (num_timesteps,)
    assert betas.dtype == torch.float64
    assert ((betas > 0) & (betas < 1)).all()
    assert (Process(levels_of_betas(betas)).half_log_snr.diff() < 0).all()


@pytest.mark.parametrize(
    ("ours", "theirs"),
    [
        ("linear", "linear"),
        ("quadratic", "scaled_linear"),
        ("cosine", "squaredcos_cap_v2"),
        ("sigmoid", "sigmoid"),
    ],
)
def test_schedules_equal_diffusers(ours, theirs):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(1000, 1e-4, 0.02, beta_schedule=theirs)
    betas = SCHEDULES[ours](1000, 1e-4, 0.02)
    torch.testing.assert_close(betas.float(), scheduler.betas, rtol=2e-4, atol=1e-7)
    alphas_cumprod = levels_of_betas(betas).signal.float() ** 2
    torch.testing.assert_close(alphas_cumprod, scheduler.alphas_cumprod, rtol=2e-4, atol=1e-7)


def test_cosine_betas_end_at_their_cap():
    """Nichol and Dhariwal 2021, section 3.2: no beta is larger than 0.999."""
    betas = SCHEDULES["cosine"](1000, 1e-4, 0.02)
    assert betas[:2].tolist() == pytest.approx([4.128422482e-05, 4.614175274e-05], rel=1e-9)
    assert betas[-3:].tolist() == pytest.approx([0.5555537567, 0.7499993929, 0.999], rel=1e-9)


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
@pytest.mark.parametrize(("num_timesteps", "steps"), [(1000, 50), (1000, 7), (300, 300), (10, 1)])
def test_grids_descend_within_range(spacing, num_timesteps, steps):
    grid = timestep_grid(num_timesteps, steps, spacing)
    assert len(grid) == steps
    assert grid == sorted(set(grid), reverse=True)
    assert 0 <= grid[-1] <= grid[0] < num_timesteps
    if spacing != "leading":
        assert grid[0] == num_timesteps - 1
    if steps == num_timesteps:
        assert grid == list(range(num_timesteps))[::-1]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace"])
def test_grids_equal_diffusers(spacing):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(1000, timestep_spacing=spacing, steps_offset=0)
    scheduler.set_timesteps(50)
    assert timestep_grid(1000, 50, spacing) == scheduler.timesteps.tolist()


@pytest.mark.parametrize("steps", [0, 101])
def test_grid_refuses_impossible_counts(steps):
    with pytest.raises(AssertionError):
        timestep_grid(100, steps, "trailing")


# --- the process


def test_q_sample_has_the_right_moments():
    diffusion = make_diffusion()
    x_0 = torch.full((20_000, 1, 1, 1), 0.5)
    t = torch.full((20_000,), 60)
    x_t = diffusion.q_sample(x_0, t, torch.randn(x_0.shape, generator=torch.manual_seed(0)))
    a = diffusion.levels(60)[0] ** 2
    assert x_t.mean().item() == pytest.approx(0.5 * a**0.5, abs=0.01)
    assert x_t.var().item() == pytest.approx(1 - a, rel=0.05)


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_predict_inverts_target(prediction_type):
    """A model that outputs the target is right about x_0 and about eps, at every t."""
    diffusion = make_diffusion(prediction_type=prediction_type)
    t = torch.arange(T)
    x_0, noise = torch.randn(2, T, 3, 4, 5)
    x_t = diffusion.q_sample(x_0, t, noise)
    prediction = diffusion.predict(diffusion.target(x_0, t, noise), x_t, t)
    torch.testing.assert_close(prediction.x_0, x_0, rtol=1e-3, atol=1e-3)
    torch.testing.assert_close(prediction.eps, noise, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_a_half_precision_output_is_read_in_float32(prediction_type):
    diffusion = make_diffusion(prediction_type=prediction_type)
    x_t, output = torch.randn(2, 4, 1, 4, 4)
    t, output = torch.tensor([0, 30, 60, 99]), output.bfloat16()
    prediction = diffusion.predict(output, x_t, t)
    assert {tensor.dtype for tensor in prediction} == {torch.float32}
    for ours, wide in zip(prediction, diffusion.predict(output.float(), x_t, t), strict=True):
        assert torch.equal(ours, wide)


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_with_x_0_keeps_the_pair_consistent(prediction_type):
    diffusion = make_diffusion(prediction_type=prediction_type)
    x_t, x_0 = torch.randn(2, 8, 1, 4, 4)
    t = torch.arange(10, 90, 10)
    x_0, eps = diffusion.with_x_0(x_0, x_t, t)
    torch.testing.assert_close(diffusion.q_sample(x_0, t, eps), x_t)


def test_losses_by_hand():
    x_0, noise = torch.randn(2, 6, 1, 4, 4)
    t = torch.arange(6) * 10

    def model(x, t, y):
        return torch.full_like(x, 0.3)

    def expected(distance):
        return distance(noise - 0.3).flatten(1).mean(1)

    for loss_type, distance in [
        ("l2", torch.square),
        ("l1", torch.abs),
        ("huber", lambda d: torch.where(d.abs() < 1, d * d / 2, d.abs() - 0.5)),
    ]:
        loss = make_diffusion(loss_type=loss_type).loss(model, x_0, None, t, noise)
        torch.testing.assert_close(loss, expected(distance))


@pytest.mark.parametrize("prediction_type", ["eps", "x_0", "v"])
def test_min_snr_is_one_weighting_of_x_0(prediction_type):
    """Whatever is predicted, min-SNR is min(SNR, gamma) times the squared error in x_0."""
    diffusion = make_diffusion(
        "cosine", prediction_type=prediction_type, loss_weighting="min_snr", min_snr_gamma=5.0
    )
    t = torch.arange(5, T - 5)
    x_0, noise = torch.randn(2, len(t), 1, 4, 4)
    x_t = diffusion.q_sample(x_0, t, noise)
    output = torch.randn_like(x_0)
    loss = diffusion.loss(lambda *_: output, x_0, None, t, noise)
    error = (diffusion.predict(output, x_t, t).x_0 - x_0).square().flatten(1).mean(1)
    weight = (2 * diffusion.half_log_snr[t]).exp().clamp(max=5.0).float()
    torch.testing.assert_close(loss, weight * error, rtol=2e-3, atol=1e-5)


# --- guidance


def guided(cfg_scale, calls=None, **options):
    diffusion = make_diffusion()

    def model(x, t, y):
        if calls is not None:
            calls.append(len(x))
        return toy_model(x, t, y)

    y = torch.tensor([0, 1, 2])
    options = {"threshold": "none", **options}
    return diffusion, make_denoiser(diffusion, model, y, cfg_scale=cfg_scale, **options)


def test_guidance_is_linear_between_null_and_class():
    x = torch.randn(3, 1, 4, 4)
    t = torch.full((3,), 50)
    out_y = toy_model(x, t, torch.tensor([0, 1, 2]))
    out_null = toy_model(x, t, torch.full((3,), NULL_LABEL))
    for scale in (0.0, 1.0, 2.5):
        _, denoise = guided(scale)
        torch.testing.assert_close(denoise(x, 50).eps, out_null + scale * (out_y - out_null))


def test_guidance_costs_one_forward():
    x = torch.randn(3, 1, 4, 4)
    for scale, batch in ((0.0, 3), (1.0, 3), (3.0, 6)):
        calls = []
        guided(scale, calls)[1](x, 10)
        assert calls == [batch]


def test_a_guided_batch_too_large_for_a_cache_goes_in_halves(monkeypatch):
    x, results = torch.randn(3, 1, 4, 4), []
    for limit, batches in ((2 * x.numel(), [6]), (2 * x.numel() - 1, [3, 3])):
        monkeypatch.setattr(guidance, "LARGEST_JOINT_CPU_BATCH", limit)
        calls = []
        results.append(guided(3.0, calls)[1](x, 10))
        assert calls == batches
    torch.testing.assert_close(*results)


def test_guidance_interval_is_conditional_outside():
    calls = []
    _, denoise = guided(3.0, calls, cfg_interval=(0.2, 0.8))
    for t in (10, 20, 80, 81):
        denoise(torch.randn(3, 1, 4, 4), t)
    assert calls == [3, 6, 6, 3]


def test_guidance_without_labels_is_refused():
    with pytest.raises(AssertionError, match="classes"):
        make_denoiser(make_diffusion(), toy_model, None, cfg_scale=2.0)


@pytest.mark.parametrize("threshold", ["static", "dynamic"])
def test_thresholds_bound_x_0_and_keep_the_pair_consistent(threshold):
    diffusion, denoise = guided(4.0, threshold=threshold)
    x = torch.randn(3, 1, 8, 8) * 2
    x_0, eps = denoise(x, 90)
    assert x_0.abs().max() <= 1
    torch.testing.assert_close(diffusion.q_sample(x_0, torch.full((3,), 90), eps), x)


def test_dynamic_threshold_rescales_each_image_by_its_own_quantile():
    x_0 = torch.linspace(-3, 3, 2 * 400).reshape(2, 1, 20, 20)
    x_0[1] *= 0.1
    bounded = threshold_x_0(x_0, "dynamic")
    limit = torch.quantile(x_0[0].abs().flatten(), 0.995)
    torch.testing.assert_close(bounded[0], x_0[0].clamp(-limit, limit) / limit)
    torch.testing.assert_close(bounded[1], x_0[1])


# --- samplers


def diffusers_run(scheduler, model, x, steps, **step_options):
    scheduler.set_timesteps(steps)
    for t in scheduler.timesteps:
        output = model(x, torch.full((len(x),), int(t)), None)
        x = scheduler.step(output, t, x, **step_options).prev_sample
    return x


@pytest.mark.parametrize("spacing", ["trailing", "leading"])
@pytest.mark.parametrize(
    ("prediction_type", "theirs"), [("eps", "epsilon"), ("x_0", "sample"), ("v", "v_prediction")]
)
@pytest.mark.parametrize("steps", [100, 20])
def test_ddim_equals_diffusers(spacing, prediction_type, theirs, steps):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDIMScheduler(
        T,
        1e-4,
        0.02,
        prediction_type=theirs,
        timestep_spacing=spacing,
        set_alpha_to_one=True,
        clip_sample=False,
        steps_offset=0,
    )
    diffusion = make_diffusion(prediction_type=prediction_type)
    denoise = make_denoiser(diffusion, toy_model, None, threshold="none")
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    expected = diffusers_run(scheduler, toy_model, x_T, steps)
    grid = timestep_grid(T, steps, spacing)
    actual = last(ddim(denoise, x_T, diffusion, grid, zeros_like_noise))
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_ddpm_equals_diffusers_with_its_noise(monkeypatch):
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DDPMScheduler(
        T, 1e-4, 0.02, variance_type="fixed_small", clip_sample=True, timestep_spacing="leading"
    )
    diffusion = make_diffusion()
    denoise = make_denoiser(diffusion, toy_model, None, threshold="static")
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    expected = diffusers_run(scheduler, toy_model, x_T, T, generator=torch.manual_seed(1))
    rng = torch.manual_seed(1)
    actual = last(
        ddpm(
            denoise,
            x_T,
            diffusion,
            timestep_grid(T, T, "trailing"),
            lambda x: torch.randn(x.shape, generator=rng),
        )
    )
    torch.testing.assert_close(actual, expected, rtol=2e-4, atol=2e-4)


def test_dpmpp_2m_equals_diffusers():
    diffusers = pytest.importorskip("diffusers")
    scheduler = diffusers.DPMSolverMultistepScheduler(
        T, 1e-4, 0.02, solver_order=2, timestep_spacing="linspace", final_sigmas_type="zero"
    )
    diffusion = make_diffusion()
    denoise = make_denoiser(diffusion, toy_model, None, threshold="none")
    x_T = torch.randn(4, 1, 4, 4, generator=torch.manual_seed(0))
    expected = diffusers_run(scheduler, toy_model, x_T, 20)
    grid = scheduler.timesteps.tolist()
    actual = last(dpmpp_2m(denoise, x_T, diffusion, grid, zeros_like_noise))
    torch.testing.assert_close(actual, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("steps", [T, 20])
@pytest.mark.parametrize("threshold", ["none", "static"])
def test_ddim_with_eta_one_is_ddpm(steps, threshold):
    diffusion = make_diffusion()
    denoise = make_denoiser(diffusion, toy_model, None, threshold=threshold)
    x_T = torch.randn(4, 1, 4, 4)
    grid = timestep_grid(T, steps, "trailing")
    results = []
    for sampler, options in ((ddpm, {}), (ddim, {"eta": 1.0})):
        rng = torch.Generator().manual_seed(3)
        results.append(
            last(
                sampler(
                    denoise,
                    x_T,
                    diffusion,
                    grid,
                    lambda x, rng=rng: torch.randn(x.shape, generator=rng),
                    **options,
                )
            )
        )
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-4)


def ideal_denoiser(diffusion, mean, std):
    """The exact posterior of data ~ N(mean, std^2), pixel by pixel."""

    def denoise(x, t):
        a = diffusion.levels(t)[0] ** 2
        variance = a * std**2 + 1 - a
        x_0 = mean + a**0.5 * std**2 / variance * (x - a**0.5 * mean)
        return diffusion.with_x_0(x_0, x, torch.full((len(x),), t))

    return denoise


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_recover_a_gaussian(name):
    """With the ideal denoiser every sampler must return the data distribution."""
    diffusion = make_diffusion("cosine", 1000)
    denoise = ideal_denoiser(diffusion, mean=0.4, std=0.3)
    rng = torch.Generator().manual_seed(0)
    x_T = torch.randn(50_000, 1, 1, 1, generator=rng)
    grid = timestep_grid(
        1000, {"ddpm": 500, "ddim": 200, "dpmpp_2m": 50, "heun": 50}[name], "trailing"
    )
    x = last(
        SAMPLERS[name].run(
            denoise, x_T, diffusion, grid, lambda x: torch.randn(x.shape, generator=rng)
        )
    )
    assert x.mean().item() == pytest.approx(0.4, abs=0.01)
    assert x.std().item() == pytest.approx(0.3, abs=0.015)


def test_second_order_beats_first_order():
    """On the probability-flow ODE of a Gaussian, whose solution is known, 2M converges faster."""
    diffusion = make_diffusion("linear", 1000)
    denoise = ideal_denoiser(diffusion, mean=0.0, std=0.5)
    x_T = torch.ones(1, 1, 1, 1)
    a = diffusion.levels(999)[0] ** 2
    exact = 0.5 / math.sqrt(a * 0.25 + 1 - a)
    error = {}
    for name in ("ddim", "dpmpp_2m"):
        grid = timestep_grid(1000, 20, "trailing")
        x = last(SAMPLERS[name].run(denoise, x_T, diffusion, grid, zeros_like_noise))
        error[name] = abs(x.item() - exact)
    assert error["dpmpp_2m"] < 0.6 * error["ddim"]


@pytest.mark.parametrize("spacing", ["trailing", "leading", "linspace", "log_snr"])
@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_yield_every_step_and_end_at_the_image(name, spacing):
    diffusion = make_diffusion()
    denoise = make_denoiser(diffusion, toy_model, None)
    grid = timestep_grid(T, 10, spacing, half_log_snr=diffusion.half_log_snr)
    steps = list(
        SAMPLERS[name].run(denoise, torch.randn(2, 1, 4, 4), diffusion, grid, torch.randn_like)
    )
    assert [step.t for step in steps] == [*grid[1:], -1]
    assert all(torch.isfinite(step.x).all() for step in steps)
    torch.testing.assert_close(steps[-1].x, steps[-1].x_0)


@pytest.mark.parametrize("eta", [0.0, 0.5])
@pytest.mark.parametrize("name", SAMPLERS)
def test_the_table_says_what_samplers_do(name, eta):
    """Whether they draw noise, how often they call the denoiser, and whether the steps of a run
    are those of one-step runs."""
    row, diffusion = SAMPLERS[name], make_diffusion()
    denoise, calls = make_denoiser(diffusion, toy_model, None), []
    x_T = torch.randn(2, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    grid = timestep_grid(T, 8, "trailing")
    options = dict.fromkeys(row.options, eta)

    def counted(x, t):
        calls.append(t)
        return denoise(x, t)

    def steps(x, grid, seed):
        rng = torch.Generator().manual_seed(seed)
        draw = partial(torch.randn, generator=rng)
        taken = row.run(counted, x, diffusion, grid, lambda x: draw(x.shape), **options)
        return [step.x for step in taken]

    whole = steps(x_T, grid, 1)
    assert len(calls) == (len(grid) - 1) * row.forwards_per_step + 1
    is_deterministic = row.deterministic
    if callable(is_deterministic):
        is_deterministic = is_deterministic(**options)
    assert torch.equal(whole[-1], steps(x_T, grid, 2)[-1]) == is_deterministic
    third = steps(whole[1], grid[2:4], 1)[0]  # taken again, from the second's x
    if is_deterministic:
        assert torch.equal(third, whole[2]) != row.multistep


# --- training examples


ALONE = Runtime(torch.device("cpu"))


def examples(runtime=ALONE, start_step=0, count=3, **settings):
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, 1, 4, 4), generator=generator, dtype=torch.uint8)
    labels = torch.randint(0, 5, (20,), generator=generator)
    dataset = InMemoryDataset(images, labels, ["a", "b", "c", "d", "e"])
    options = dict(seed=1, batch_size=8, num_timesteps=T, conditional=True, cfg_dropout_prob=0.5)
    config = Config(**{**options, **settings})
    made = training_examples(config, build_process(config), dataset, runtime, start_step)
    return [next(made) for _ in range(count)]


def parts_of(example):
    *parts, planes = example
    assert planes is None  # there is no condition
    return parts


def test_examples_of_ranks_concatenate_to_the_global_batch():
    whole = examples()
    halves = zip(*(examples(replace(ALONE, rank=r, world_size=2)) for r in (0, 1)), strict=True)
    for one, (first, second) in zip(whole, halves, strict=True):
        for a, b, c in zip(*map(parts_of, (one, first, second)), strict=True):
            assert torch.equal(a, torch.cat([b, c]))


@pytest.mark.parametrize("batch_size", [7, 128, 300, 2048])
def test_the_noise_of_a_step_is_that_of_any_number_of_processes(batch_size, monkeypatch):
    """And of a batch of one block, what it was when each process drew the whole batch."""
    made, drawn, randn = {}, [], torch.randn

    def counted(size, **settings):
        drawn.append(size[0])
        return randn(size, **settings)

    monkeypatch.setattr(torch, "randn", counted)
    for world_size in (1, 2, 3, 8):
        ranks, most = [replace(ALONE, rank=r, world_size=world_size) for r in range(world_size)], 0
        parts = []
        for runtime in ranks:
            drawn.clear()
            parts.append(examples(runtime, start_step=2, count=1, batch_size=batch_size)[0].noise)
            most = max(most, sum(drawn))
        assert [len(part) for part in parts] == [len(r.share(batch_size)) for r in ranks]
        assert most <= len(ranks[0].share(batch_size)) + 2 * (NOISE_BLOCK - 1)
        made[world_size] = torch.cat(parts)
    assert all(torch.equal(noise, made[1]) for noise in made.values())
    assert len(made[1].flatten(1).unique(dim=0)) == batch_size  # no two rows, or blocks, are equal
    first = randn(min(batch_size, 128), 1, 4, 4, generator=torch_generator(1, Stream.NOISE, 2))
    assert torch.equal(made[1][:128], first)
    if batch_size == 2048:
        assert most == batch_size / 8


def test_examples_depend_on_the_step_alone():
    whole = examples(count=5)
    later = examples(start_step=3, count=2)
    for one, other in zip(whole[3:], later, strict=True):
        assert all(map(torch.equal, parts_of(one), parts_of(other)))
    assert not torch.equal(whole[0].noise, whole[1].noise)


def test_every_timestep_is_trained():
    (example,) = examples(count=1, batch_size=256, num_timesteps=4)
    assert example.t.dtype == torch.int64
    assert example.t.unique().tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("step", [0, 3])
def test_timesteps_noise_and_label_dropout_have_streams_of_their_own(step):
    example = examples(start_step=step, count=1)[0]

    def generator(stream):
        return torch_generator(1, stream, step)

    noise = torch.randn(8, 1, 4, 4, generator=generator(Stream.NOISE))
    chance = torch.rand(8, generator=generator(Stream.LABEL_DROPOUT))
    assert torch.equal(example.t, torch.randint(T, (8,), generator=generator(Stream.TIMESTEP)))
    assert torch.equal(example.noise, noise)
    assert torch.equal(example.y == NULL_LABEL, chance < 0.5)


def test_label_dropout_has_its_rate_and_touches_nothing_else():
    (plain,) = examples(count=1, batch_size=4096, cfg_dropout_prob=0.0)
    (example,) = examples(count=1, batch_size=4096, cfg_dropout_prob=0.25)
    dropped = example.y == NULL_LABEL
    assert dropped.float().mean().item() == pytest.approx(0.25, abs=0.03)
    assert torch.equal(example.y[~dropped], plain.y[~dropped])
    assert all(torch.equal(example[i], plain[i]) for i in (0, 2, 3))


def test_unconditional_examples_have_no_labels():
    assert examples(conditional=False, cfg_dropout_prob=0.0)[0].y is None
