"""What is timed: steps of one network, our training loop and our sampler."""

from __future__ import annotations

import copy
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import (
    CHANNELS,
    NUM_CLASSES,
    SIDE,
    Candidate,
    count_flops,
    draw_inputs,
    fill_zeros,
)
from benchmarks.timing import Task
from datasets.loader import make_resident
from datasets.storage import InMemoryDataset
from diffusion import build_process, make_denoiser
from diffusion.guidance import threshold_x_0
from generation.sampling import Run, generate, sampling_from
from models import compile_model
from training.build import build_trainer
from training.job import Job
from training.learner import Learner
from training.objective import training_examples
from training.progress import Schedule
from training.run_dir import Status
from training.saving import LOSS, BestScore
from training.trainer import Trainer
from utils.config import Config
from utils.distributed import Runtime
from utils.images import ImageSpec
from utils.labels import NULL_LABEL
from utils.precision import autocast

NUM_IMAGES = 50_000  # as CIFAR-10
LOOP_STEPS = 5  # optimizer steps of one turn
SAMPLER_STEPS = 10
CFG_SCALE = 2.0
COMPILED = ", compiled"
ROOF_SIDES = {"cpu": 1024, "cuda": 8192}  # of the matrices whose product is the roof
SPEC = ImageSpec(CHANNELS, SIDE, SIDE, NUM_CLASSES)


class Setting(NamedTuple):
    """How every network is run."""

    device: torch.device
    precision: str
    memory_format: torch.memory_format
    batch_size: int

    def inputs(self, batch_size: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        x, t, y = draw_inputs(batch_size or self.batch_size, self.device)
        return x.to(memory_format=self.memory_format), t, y


class Network(NamedTuple):
    """A candidate, built."""

    name: str
    family: str
    width: int
    model: nn.Module
    gflops: float  # of one image's forward pass


def make_network(candidate: Candidate, width: int) -> Network:
    torch.manual_seed(0)
    model = candidate.build(width)
    fill_zeros(model)
    return Network(candidate.name, candidate.family, width, model, count_flops(model) / 1e9)


def place(network: Network, setting: Setting) -> None:
    network.model.to(setting.device, memory_format=setting.memory_format)
    if hasattr(network.model, "choose_backend"):
        network.model.choose_backend(setting.device)


def compiled(network: Network, how: str) -> Network:
    """A copy that is compiled when it runs first."""
    model = copy.deepcopy(network.model)
    compile_model(getattr(model, "network", model), how)  # another package's stands in a wrapper
    return network._replace(name=network.name + COMPILED, model=model)


def set_mode(model: nn.Module, *, training: bool) -> None:
    if model.training != training:
        model.train(training)


# --- a step of one network


def training_step(model: nn.Module, setting: Setting) -> Task:
    """Forward, backward, clipping and a fused AdamW step, and nothing else."""
    inputs = setting.inputs()
    noise = torch.randn_like(inputs[0])
    parameters = list(model.parameters())
    optimizer = torch.optim.AdamW(parameters, lr=1e-5, fused=True)

    def step() -> None:
        set_mode(model, training=True)
        with autocast(setting.precision, setting.device):
            loss = F.mse_loss(model(*inputs).float(), noise)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def forward_pass(model: nn.Module, setting: Setting) -> Task:
    inputs = setting.inputs()

    def forward() -> Tensor:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            return model(*inputs)

    return forward


def sampling_step(model: nn.Module, setting: Setting) -> Task:
    """A guided DDIM step as plainly as it can be written."""
    x, t, y = setting.inputs()
    both = torch.cat([x, x]), t.repeat(2), torch.cat([y, torch.full_like(y, NULL_LABEL)])

    def step() -> Tensor:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            out_y, out_null = model(*both).float().chunk(2)
            eps = out_null + CFG_SCALE * (out_y - out_null)
            x_0 = ((x - 0.8 * eps) / 0.6).clamp(-1, 1)
            return 0.7 * x_0 + 0.3 * (x - 0.6 * x_0)

    return step


def matrix_product(setting: Setting) -> Task:
    """The roof: what the machine does when it does nothing but multiply."""
    low = setting.device.type == "cuda" and setting.precision == "bf16"
    dtype = torch.bfloat16 if low else torch.float32
    side = ROOF_SIDES[setting.device.type]
    a, b = torch.randn(2, side, side, device=setting.device, dtype=dtype)
    return lambda: a @ b


def guided_step(model: nn.Module, setting: Setting, count: int) -> Task:
    x, t, y = setting.inputs(count)
    denoise = make_denoiser(build_process(Config()), model, y, cfg_scale=CFG_SCALE)
    timestep = int(t[0])

    def step() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            denoise(x, timestep)

    return step


def two_passes(model: nn.Module, setting: Setting, count: int) -> Task:
    """What `guided_step` computes, the network called for each half by itself."""
    x, t, y = setting.inputs(count)
    process, times = build_process(Config()), t[:1].expand(count).clone()
    null = torch.full_like(y, NULL_LABEL)

    def step() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            out_y, out_null = model(x, times, y).float(), model(x, times, null).float()
            output = out_null + CFG_SCALE * (out_y - out_null)
            x_0 = process.predict(output, x, times).x_0
            process.with_x_0(threshold_x_0(x_0, "static"), x, times)

    return step


def repeated(task: Task, times: int) -> Task:
    def run() -> None:
        for _ in range(times):
            task()

    return run


# --- our loop and our sampler


def make_config(network: Network, setting: Setting, folder: Path, *, ema: bool = True) -> Config:
    return Config(
        dataset="cifar10",
        conditional=True,
        model_type=network.family,
        batch_size=setting.batch_size,
        learning_rate=1e-5,
        horizontal_flip=True,
        precision=setting.precision,
        use_ema=ema,
        num_inference_steps=SAMPLER_STEPS,
        cfg_scale=CFG_SCALE,
        save_interval=10**6,
        sample_interval=10**6,
        save_dir=str(folder),
        experiment_name=network.name,
    )


def make_images(device: torch.device) -> InMemoryDataset:
    """Noise, in the shape and the number of CIFAR-10."""
    shape = (NUM_IMAGES, CHANNELS, SIDE, SIDE)
    images = torch.randint(256, shape, dtype=torch.uint8, device=device)
    labels = torch.randint(NUM_CLASSES, (NUM_IMAGES,))
    names = [str(i) for i in range(NUM_CLASSES)]
    return InMemoryDataset(images, labels, names, fingerprint="noise")


def make_trainer(
    network: Network, setting: Setting, dataset: InMemoryDataset, folder: Path, *, ema: bool
) -> Trainer:
    """As train.py puts it together."""
    config, runtime = make_config(network, setting, folder, ema=ema), Runtime(setting.device)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    schedule, process = Schedule(NUM_IMAGES, setting.batch_size, 0), build_process(config)
    images = make_resident(dataset, runtime)
    examples = partial(training_examples, config, process, images, runtime)
    job = Job(
        config, runtime, dataset, schedule, network.model, process, examples, setting.precision
    )
    best = BestScore(LOSS, lower_is_better=True)
    return build_trainer(job, Learner(job), Status(None), best=best, evaluate=None, preview=None)


def few_steps(trainer: Trainer) -> Task:
    def train() -> None:
        stop = trainer.step + LOOP_STEPS
        trainer.saver.last_step = stop  # or train() would end by saving
        trainer.schedule = Schedule(NUM_IMAGES, trainer.config.batch_size, stop)
        trainer.train()

    return train


def bare_passes(model: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Task:
    def run() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            for _ in range(SAMPLER_STEPS):
                model(*inputs)

    return run


def real_sampling(network: Network, setting: Setting, labels: list[int], folder: Path) -> Task:
    config = make_config(network, setting, folder)
    run = Run(network.model, build_process(config), SPEC, config)
    sampling, runtime = sampling_from(config), Runtime(setting.device)
    count = setting.batch_size

    def sample() -> None:
        set_mode(network.model, training=False)
        for _ in generate(
            run, range(count), labels, sampling=sampling, batch_size=count, runtime=runtime
        ):
            pass

    return sample
