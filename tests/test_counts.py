"""Counts that speed rests on: waits for the device, reductions, forward passes, memory."""

from __future__ import annotations

import argparse
import contextlib
import itertools
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

import models
from benchmarks.networks import draw_inputs, our_dit, our_unet, saved_bytes
from benchmarks.timing import set_up
from datasets.loader import make_resident
from datasets.storage import InMemoryDataset
from diffusion import build_process
from generation.run import CONFIG_CHECKS, Run
from generation.sampling import generate, sampling_from
from models.dim import DiM
from models.mamba import Backend
from models.unet import AttentionBlock, UNet, Upsample
from training.build import build_trainer, log_start
from training.job import Job
from training.learner import Learner
from training.objective import Example, training_examples
from training.progress import Schedule
from training.run_dir import Status
from training.saving import LOSS, BestScore
from training.sharding import wrap_for_training
from training.trainer import Trainer
from utils.config import Config, load_config
from utils.distributed import Runtime
from utils.errors import EXIT_FAILURE, EXIT_PREEMPTED
from utils.images import ImageSpec
from utils.precision import autocast, resolve_precision, sampling_autocast

CPU = torch.device("cpu")
SIDE, NUM_CLASSES, BATCH_SIZE = 8, 3, 8
SPEC = ImageSpec(1, SIDE, SIDE, NUM_CLASSES)
MIB = 2**20


def tiny_unet() -> UNet:
    return UNet(
        image_size=(SIDE, SIDE),
        in_channels=1,
        num_classes=NUM_CLASSES,
        model_channels=8,
        channel_mult=(1, 2),
        num_res_blocks=1,
    )


def make_trainer(
    folder: Path, runtime: Runtime, model: nn.Module | None = None, **settings
) -> Trainer:
    """As train.py composes it for a CUDA device: flags stay on the device until they are read."""
    config = Config(
        conditional=True,
        batch_size=BATCH_SIZE,
        horizontal_flip=True,
        use_scheduler=True,
        save_dir=str(folder),
        experiment_name="counted",
        **settings,
    )
    config.run_dir.mkdir()
    generator = torch.Generator().manual_seed(0)
    images = torch.randint(256, (20, *SPEC[:3]), dtype=torch.uint8, generator=generator)
    dataset = InMemoryDataset(images, torch.arange(20) % NUM_CLASSES, ["a", "b", "c"])
    held = make_resident(dataset, runtime)
    schedule, process = Schedule(len(dataset), BATCH_SIZE, 100), build_process(config)
    examples = partial(training_examples, config, process, held, runtime)
    model = model or tiny_unet().to(runtime.device)
    job = Job(config, runtime, dataset, schedule, model, process, examples)
    best = BestScore(LOSS, lower_is_better=True)
    trainer = build_trainer(job, Learner(job), Status(None), best=best, evaluate=None, preview=None)
    trainer.guard.on_host = False
    return trainer


def train_to(trainer: Trainer, step: int) -> None:
    """Go on to `step`, and save nothing."""
    trainer.saver.last_step = step
    trainer.schedule = Schedule(20, BATCH_SIZE, step)
    trainer.train()


class HostReads(TorchDispatchMode):
    """Counts where the host takes a number from a tensor, for which it would wait for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def copies_to_the_host(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """Names of the tensor methods that read a device and are no operator on a CPU."""
    called = []
    with monkeypatch.context() as patch:
        for name in ("tolist", "numpy", "cpu"):
            method = getattr(Tensor, name)

            def spy(self: Tensor, *args: Any, name=name, method=method, **options: Any) -> Any:
                called.append(name)
                return method(self, *args, **options)

            patch.setattr(Tensor, name, spy)
        yield called


def test_the_host_reads_nothing_between_log_steps(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, Runtime(CPU), log_interval=5)
    train_to(trainer, 1)  # the first step logs
    with HostReads() as reads, copies_to_the_host(monkeypatch) as copies:
        train_to(trainer, 4)
        assert (reads.count, copies) == (0, [])
        train_to(trainer, 5)
        assert reads.count > 0  # it does count


@pytest.fixture
def two_processes() -> Iterator[Runtime]:
    """Rank 0 of two, whose collectives return at once."""
    dist.init_process_group("fake", rank=0, world_size=2, store=FakeStore())
    try:
        yield Runtime(CPU, rank=0, world_size=2)
    finally:
        dist.destroy_process_group()


def watch_reductions(network: nn.Module) -> list[int]:
    """The number of values of each bucket of gradients that is reduced from now on."""
    reduced = []

    def hook(_, bucket):  # DDP refuses annotations that are strings
        reduced.append(bucket.buffer().numel())
        future = torch.futures.Future()
        future.set_result(bucket.buffer())
        return future

    network.register_comm_hook(None, hook)
    return reduced


@pytest.mark.parametrize("micro_batches", [1, 4])
def test_gradients_are_reduced_once_per_step(tmp_path, two_processes, micro_batches):
    trainer = make_trainer(tmp_path, two_processes, gradient_accumulation_steps=micro_batches)
    reduced = watch_reductions(trainer.learner.network)
    num_steps, num_parameters = 3, sum(p.numel() for p in trainer.learner.parameters)
    train_to(trainer, num_steps)
    assert reduced == num_steps * [num_parameters]


@pytest.mark.parametrize(("seconds", "most"), [(0.01, 7), (0.4, 22), (3.0, 42)])
def test_processes_meet_at_every_tenth_step(
    tmp_path, two_processes, monkeypatch, seconds: float, most: int
):
    """Or, of slow steps, about once a second, so that a signal is heard in time."""
    trainer = make_trainer(tmp_path, two_processes, log_interval=1000)
    trainer._train_step = lambda example: None
    clock = SimpleNamespace(monotonic=lambda: trainer.step * seconds)
    monkeypatch.setattr("training.trainer.time", clock)
    steps = []
    monkeypatch.setattr(
        Runtime, "all_reduce", lambda self, x, op="sum": steps.append(trainer.step) or x
    )
    train_to(trainer, 40)
    votes = [step for step in steps if step not in (1, 40)]  # where it reads losses, too
    assert most - 4 <= len(votes) <= most
    assert max(b - a for a, b in itertools.pairwise(sorted(set(steps)))) <= 10


@pytest.mark.parametrize("at", range(1, 12))
def test_a_signal_waits_ten_steps_at_most(tmp_path, two_processes, monkeypatch, at: int):
    trainer = make_trainer(tmp_path, two_processes, log_interval=1000)

    def step(example: Any) -> None:
        if trainer.step == at:
            signal.raise_signal(signal.SIGUSR1)

    trainer._train_step = step
    trainer._stop_early = lambda name: EXIT_PREEMPTED if name == "SIGUSR1" else EXIT_FAILURE
    trainer.schedule = Schedule(20, BATCH_SIZE, 60)
    assert trainer.train() == EXIT_PREEMPTED
    assert at < trainer.step <= at + 10


@pytest.mark.filterwarnings("error:Grad strides")
def test_ddp_does_not_warn_of_the_layout_of_1x1_convolutions(two_processes):
    """Their sides of length 1 may have any stride, so there is nothing for a user to do."""
    _, network = wrap_for_training(AttentionBlock(32, num_head_channels=64), two_processes)
    watch_reductions(network)
    torch.set_warn_always(True)
    try:
        network(torch.randn(32, 32, 16, 16)).square().sum().backward()
    finally:
        torch.set_warn_always(False)


def test_what_sampling_took_is_given_back(tmp_path, monkeypatch):
    """To other processes on the GPU; training asks for less."""
    trainer, calls = make_trainer(tmp_path, Runtime(CPU)), []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: calls.append("empty"))
    trainer._attempt("evaluation", 1, lambda epoch, step: calls.append("evaluate"))
    assert calls == ["evaluate", "empty"]


class RowCounter(nn.Module):
    """A network that counts the images it is given; labels below 0 are the null label's."""

    def __init__(self) -> None:
        super().__init__()
        self.conditional = self.unconditional = 0

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.conditional += int((y >= 0).sum())
        self.unconditional += int((y < 0).sum())
        return 0.1 * x


def passes_per_image(**settings: Any) -> tuple[float, float]:
    """Forward passes that the real sampling path spends on an image: with its class, without."""
    config, counter = Config(conditional=True, **settings), RowCounter()
    run = Run(counter, build_process(config), SPEC, config)
    labels, runtime = [0, 1, 2], Runtime(CPU)
    parts = generate(
        run, range(3), labels, sampling=sampling_from(config), batch_size=2, runtime=runtime
    )
    assert sum(map(len, parts)) == len(labels)
    return counter.conditional / len(labels), counter.unconditional / len(labels)


METHODS = {"ddpm": 100, "ddim": 50, "dpmpp_2m": 20}  # their default steps where T is 100


@pytest.mark.parametrize("method", METHODS)
def test_passes_per_image(method):
    def passes(**settings: Any) -> tuple[float, float]:
        return passes_per_image(num_timesteps=100, sampling_method=method, **settings)

    assert passes(cfg_scale=1.0) == (METHODS[method], 0)
    assert passes(cfg_scale=1.0, num_inference_steps=10) == (10, 0)
    assert passes(cfg_scale=0.0, num_inference_steps=10) == (0, 10)
    assert passes(cfg_scale=3.0, num_inference_steps=10) == (10, 10)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    ("interval", "guided"),
    [((0.0, 1.0), 10), ((0.2, 0.6), 4), ((0.29, 0.59), 4), ((0.9, 1.0), 1), ((0.0, 0.05), 0)],
)
def test_an_interval_saves_the_passes_outside_it(method, interval, guided):
    """t is 99, 89, ..., 9 of T = 100; both ends of the interval belong to it."""
    settings = dict(num_timesteps=100, num_inference_steps=10, sampling_method=method)
    assert passes_per_image(cfg_scale=3.0, cfg_interval=interval, **settings) == (10, guided)


@pytest.mark.parametrize(
    ("build", "width", "limit"),
    # What diffusers' networks keep at the same size: UNet2DModel 12.0, DiTTransformer2DModel 15.5.
    [(our_unet, 32, 12.0), (our_dit, 128, 15.5)],
)
def test_what_a_forward_pass_keeps_for_backward(
    build: Callable[[int], nn.Module], width: int, limit: float
):
    batch_size = 2
    size = saved_bytes(build(width), *draw_inputs(batch_size, CPU))
    assert size / batch_size / MIB <= limit


# Operators without a kernel: views, memory, questions.
FREE = ("prim.", "aten._unsafe_view.", "aten.new_empty", "aten.promote_types.", "profiler.")


class Launches(TorchDispatchMode):
    """Counts operators that a GPU would start a kernel for, and casts of the parameters `of`."""

    def __init__(self, of: nn.Module) -> None:
        super().__init__()
        self.parameters, self.count, self.casts = [*of.parameters()], 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None) -> Any:
        name = str(func)
        is_free = func.is_view or name.startswith(FREE)
        self.count += not is_free
        if name.startswith(("aten._to_copy.", "aten.to.")):
            self.casts += any(args[0] is parameter for parameter in self.parameters)
        return func(*args, **(kwargs or {}))


def test_weights_are_cast_once_for_all_steps_and_images_are_the_same(monkeypatch):
    """Autocast by itself casts weights that are not trained anew at each step."""
    run = Run(tiny_unet().eval(), build_process(Config()), SPEC, Config(conditional=True))
    generator = torch.Generator().manual_seed(0)
    for parameter in run.model.parameters():
        parameter.data += 0.05 * torch.randn(parameter.shape, generator=generator)
    run.model.requires_grad_(False)

    def draw(**settings: Any) -> tuple[Tensor, int]:
        config = Config(conditional=True, num_inference_steps=3, **settings)
        options = dict(sampling=sampling_from(config), batch_size=4, runtime=Runtime(CPU))
        with Launches(run.model) as launches:
            parts = list(generate(replace(run, config=config), range(4), [0, 1, 2, 0], **options))
        assert not any(parameter.requires_grad for parameter in run.model.parameters())
        return torch.cat(parts), launches.casts

    layers = [m for m in run.model.modules() if isinstance(m, nn.Linear | nn.Conv2d)]
    images, casts = draw(precision="bf16")
    upsampling = 1  # on a CPU its kernel is computed from the weight at each step
    assert casts == 2 * len(layers) - upsampling
    assert draw(precision="fp32")[1] == 0

    @contextlib.contextmanager
    def plain(precision: str, device: torch.device, *_: nn.Module) -> Iterator[None]:
        with torch.inference_mode(), autocast(precision, device):
            yield

    monkeypatch.setattr("generation.sampling.sampling_autocast", plain)
    again, more_casts = draw(precision="bf16")
    assert more_casts == 3 * casts
    assert torch.equal(again, images)


@pytest.mark.parametrize(("name", "most"), [("cifar10_unet", 320), ("cifar10_dit", 250)])
def test_launches_of_a_forward_pass_in_sampling(monkeypatch, name: str, most: int):
    monkeypatch.setattr(  # as on a GPU
        Upsample, "forward", lambda self, x: self.conv(F.interpolate(x, scale_factor=2.0))
    )
    config = load_config(Path(__file__).parents[1] / "configs" / f"{name}.py", checks=CONFIG_CHECKS)
    with FakeTensorMode():  # computes nothing but shapes
        model = models._construct(config, ImageSpec(3, 32, 32, 10)).eval()
        t, y = (torch.zeros(2, dtype=torch.int64) for _ in range(2))
        with sampling_autocast("bf16", CPU, model.requires_grad_(False)):
            model(torch.zeros(2, 3, 32, 32), t, y)
            with Launches(model) as launches:
                model(torch.zeros(2, 3, 32, 32), t, y)
    assert most - 20 < launches.count <= most
    assert launches.casts == 0


def launches_of_a_step(trainer: Trainer, example: Example, depth: int) -> int:
    """Of a training step in bf16 with cifar10_dim at that depth, the scan as our Triton kernel."""
    from models.triton_scan import gated_scan

    params = dict(hidden_size=384, depth=depth, mixer="mamba1")
    with FakeTensorMode(allow_non_fake_inputs=True):  # computes nothing but shapes
        config = Config(conditional=True, model_type="dim", model_params=params, use_ema=False)
        model = models._construct(config, ImageSpec(3, 32, 32, 10))
        for block in model.blocks:
            block.mixer.backend = Backend("triton", kernel=gated_scan)
        job = replace(trainer.job, config=config, model=model, precision="bf16")
        trainer.learner = Learner(job)
        trainer._train_step(example)  # which makes the optimizer's state
        with Launches(model) as launches:
            trainer._train_step(example)
    of_the_average = 1
    return launches.count + of_the_average


@pytest.mark.slow
@pytest.mark.ci
def test_launches_of_a_training_step_of_dim_with_our_kernel(tmp_path, monkeypatch):
    """384x25 with 366 tokens: the PyTorch scan takes five times as many."""
    pytest.importorskip("triton")
    clip_grad = torch.nn.utils.clip_grad  # as on a GPU, all parameters at once
    monkeypatch.setattr(clip_grad, "_has_foreach_support", lambda *_: True)
    monkeypatch.setattr("models.mamba.KERNEL_DEVICES", ("cpu",))
    tabulate = DiM._init_paths

    def with_numbers(self: DiM, *arguments: Any) -> None:
        with unset_fake_temporarily():
            tabulate(self, *arguments)

    monkeypatch.setattr(DiM, "_init_paths", with_numbers)
    trainer = make_trainer(tmp_path, Runtime(CPU))
    x, rows = torch.zeros(2, 3, 32, 32), torch.zeros(2, dtype=torch.int64)
    example = Example(x, rows, rows, x)
    first, second = (launches_of_a_step(trainer, example, depth) for depth in (3, 5))
    assert first + (25 - 3) * (second - first) / 2 <= 3600


def test_the_average_is_compiled_where_evaluations_draw_with_it(tmp_path, monkeypatch):
    """A deep copy of a compiled model is not; previews alone are drawn sooner without."""
    compiled = []
    monkeypatch.setattr("training.learner.compile_model", lambda *given: compiled.append(given))
    for interval in (0, 1):
        folder = tmp_path / str(interval)
        folder.mkdir()
        trainer = make_trainer(folder, Runtime(CPU), compile="blocks", eval_interval=interval)
        models = (trainer.job.model, trainer.learner.ema.model)[: 1 + interval]
        assert compiled == [(model, "blocks") for model in models]
        compiled.clear()


def test_auto_precision_is_fp32_on_a_cpu():
    """bf16 autocast is 2 to 3 times slower on CPUs without units for it."""
    assert resolve_precision("auto", CPU) == "fp32"


def test_benchmarks_compare_with_tf32_as_the_scripts_do(monkeypatch):
    """Beside full float32, which nobody trains in, bf16 would gain too much."""
    calls = []
    monkeypatch.setattr("benchmarks.timing.allow_tf32", lambda: calls.append("tf32"))
    for device, expected in (("cpu", []), ("cuda", ["tf32"])):
        set_up(argparse.Namespace(threads=1, device=device))
        assert calls == expected


@pytest.mark.parametrize(
    ("device", "compile", "warned"),
    [("cuda", None, True), ("cuda", "blocks", False), ("cpu", None, False)],
)
def test_channels_last_that_costs_more_than_it_brings_is_told(
    tmp_path, monkeypatch, caplog, device: str, compile: str | None, warned: bool
):
    """On a GPU the kernel of group norm returns the other layout, which compiled code does not."""
    monkeypatch.setattr("training.build.describe_device", str)
    job = make_trainer(tmp_path, Runtime(CPU), channels_last=True).job
    config = job.config.model_copy(update={"compile": compile})
    log_start(replace(job, config=config, runtime=Runtime(torch.device(device))))
    assert any(line.startswith("channels_last=True: ") for line in caplog.messages) == warned
