"""Our networks, training loop and sampler beside those of other packages.

pip install -r benchmarks/requirements.txt
python -m benchmarks.peers
python -m benchmarks.peers --rounds 31 --json peers.jsonl
python -m benchmarks.peers --only networks --family unet
python -m benchmarks.peers --device cuda --dtype bf16 --batch_size 128 --compile blocks

networks   training step, forward pass and guided sampling step at about equal FLOPs, and what a
           forward pass keeps for backward
loop       the real training loop beside a bare one
sampler    the real sampling path beside bare forward passes
guidance   a guided step beside two separate passes

With --compile every network is there twice, as it is and compiled. All of it runs in every round,
in an order drawn anew; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import copy
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.networks import (
    CANDIDATES,
    CHANNELS,
    NUM_CLASSES,
    OUR_DIT,
    REFERENCES,
    SIDE,
    Candidate,
    choose_width,
    count_flops,
    draw_inputs,
    fill_zeros,
    saved_bytes,
)
from benchmarks.timing import (
    Report,
    Task,
    Times,
    add_options,
    clock_of,
    describe,
    ratio,
    run_rounds,
)
from datasets.loader import make_resident
from datasets.storage import InMemoryDataset
from diffusion import build_diffusion, make_denoiser
from diffusion.generation import Run, generate, sampling_from
from diffusion.guidance import threshold_x_0
from diffusion.objective import timestep_quartiles
from models import compile_model
from train import best_score, make_examples, make_guard
from utils.config import Config
from utils.distributed import Runtime
from utils.ema import EMA
from utils.images import ImageSpec
from utils.labels import NULL_LABEL
from utils.optim import build_lr_scheduler, build_optimizer
from utils.precision import autocast
from utils.run_dir import Status
from utils.schedule import Schedule
from utils.tracking import start_trackers
from utils.trainer import Trainer

SECTIONS = ("networks", "loop", "sampler", "guidance")
FAMILIES = tuple(REFERENCES)
PACKAGES = ("diffusers", "denoising-diffusion-pytorch")
NUM_IMAGES = 50_000  # as CIFAR-10
LOOP_STEPS = 5  # optimizer steps of one turn
SAMPLER_STEPS = 10
CFG_SCALE = 2.0
GUIDANCE_BATCHES = (1, 4, 16)
COMPILED = ", compiled"
ROOF, ROOF_SIDE = "matrix product", 1024
MIB = 2**20
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


def make_networks(families: list[str], gflops: float) -> list[Network]:
    """The candidates of some families at the width nearest to `gflops`."""
    dit = next(candidate for candidate in CANDIDATES if candidate.name == OUR_DIT)
    return [
        make_network(candidate, choose_width(candidate if candidate.widths else dit, 1e9 * gflops))
        for candidate in CANDIDATES
        if candidate.family in families
    ]


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


# --- networks


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
    a, b = torch.randn(2, ROOF_SIDE, ROOF_SIDE, device=setting.device, dtype=dtype)
    return lambda: a @ b


KINDS: dict[str, Callable[[nn.Module, Setting], Task]] = {
    "train": training_step,
    "forward": forward_pass,
    "CFG step": sampling_step,
}


def network_tasks(networks: list[Network], setting: Setting) -> dict[str, Task]:
    tasks = {
        f"{kind}, {network.name}": make(network.model, setting)
        for network in networks
        for kind, make in KINDS.items()
    }
    return {**tasks, ROOF: matrix_product(setting)}


def network_rows(
    networks: list[Network], setting: Setting, times: Times
) -> Iterator[dict[str, Any]]:
    gflops = {network.name: network.gflops for network in networks}
    is_compiled = any(name.endswith(COMPILED) for name in gflops)
    roof = 2e-9 * ROOF_SIDE**3 / median(times[ROOF])  # GFLOP/s
    for network in networks:
        ours = REFERENCES[network.family]
        row = {
            "network": network.name,
            "width": network.width,
            "M params": sum(p.numel() for p in network.model.parameters()) / 1e6,
            "GFLOP": network.gflops,
        }
        for kind in KINDS:
            task, other = f"{kind}, {ours}", f"{kind}, {network.name}"
            speed = setting.batch_size / median(times[other])
            row[f"{kind}: img/s"] = speed
            if kind == "train":
                row["of the roof"] = 3 * network.gflops * speed / roof
            is_peer = network.name != ours and network.family != "dim" and ours in gflops
            factor = gflops[ours] / network.gflops if is_peer else 1.0
            row[f"{kind}: ours is x faster per FLOP"] = (
                ratio(times, other, task, factor) if is_peer else None
            )
            if is_compiled:
                row[f"{kind}: ours, compiled, is x faster per FLOP"] = (
                    ratio(times, other, task + COMPILED, factor)
                    if network.family != "dim" and network.name != ours + COMPILED
                    else None
                )
        row["saved MiB/img"] = None
        if not network.name.endswith(COMPILED):
            with autocast(setting.precision, setting.device):
                size = saved_bytes(network.model.train(), *setting.inputs())
            row["saved MiB/img"] = size / setting.batch_size / MIB
        yield row


def dim_rows(networks: list[Network], times: Times) -> list[dict[str, Any]]:
    """DiM's images per second over those of our DiT of the same width and depth."""
    names = [network.name for network in networks if network.family == "dim"]
    if not any(network.name == OUR_DIT for network in networks):
        return []
    return [
        {"network": name}
        | {kind: ratio(times, f"{kind}, {OUR_DIT}", f"{kind}, {name}") for kind in KINDS}
        for name in names
    ]


# --- our loop and our sampler


def make_config(network: Network, setting: Setting, folder: Path) -> Config:
    return Config(
        dataset="cifar10",
        conditional=True,
        model_type=network.family,
        batch_size=setting.batch_size,
        learning_rate=1e-5,
        horizontal_flip=True,
        precision=setting.precision,
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
    config, runtime = make_config(network, setting, folder), Runtime(setting.device)
    config.run_dir.mkdir(parents=True, exist_ok=True)
    process, model = build_diffusion(config), network.model
    optimizer = build_optimizer(model, config)
    return Trainer(
        model,
        model,
        lambda network, example: process.loss(network, *example),
        make_examples(config, make_resident(dataset, setting.device), runtime),
        optimizer=optimizer,
        lr_scheduler=build_lr_scheduler(optimizer, lambda _: 1.0),
        ema=EMA(model, config.ema_decay) if ema else None,
        precision=setting.precision,
        schedule=Schedule(NUM_IMAGES, setting.batch_size, 0),
        runtime=runtime,
        tracker=start_trackers(config, is_main=True, start_step=0, run_id=None),
        config=config,
        extra_state={},
        status=Status(None),
        guard=make_guard(config, dataset, runtime),
        best=best_score(config),
        buckets=timestep_quartiles(config.num_timesteps),
    )


def few_steps(trainer: Trainer) -> Task:
    def train() -> None:
        stop = trainer.step + LOOP_STEPS
        trainer.saver.last_step = stop  # or train() would end by saving
        trainer.schedule = Schedule(NUM_IMAGES, trainer.config.batch_size, stop)
        trainer.train()

    return train


def repeated(task: Task, times: int) -> Task:
    def run() -> None:
        for _ in range(times):
            task()

    return run


def loop_tasks(networks: list[Network], setting: Setting, folder: Path) -> dict[str, Task]:
    dataset, tasks = make_images(setting.device), {}
    for network in networks:
        bare = training_step(network.model, setting)
        tasks[f"bare loop, {network.name}"] = repeated(bare, LOOP_STEPS)
        for ema in (False, True):
            name = f"{'loop with EMA' if ema else 'loop'}, {network.name}"
            tasks[name] = few_steps(make_trainer(network, setting, dataset, folder / name, ema=ema))
    return tasks


def loop_rows(networks: list[Network], times: Times) -> Iterator[dict[str, Any]]:
    for network in networks:
        row = {"network": network.name}
        for kind in ("loop", "loop with EMA"):
            value = ratio(times, f"{kind}, {network.name}", f"bare loop, {network.name}")
            row[f"{kind}, x bare"] = value
        yield row


def sampler_tasks(networks: list[Network], setting: Setting, folder: Path) -> dict[str, Task]:
    tasks = {}
    for network in networks:
        x, t, y = setting.inputs()
        both = torch.cat([x, x]), t.repeat(2), torch.cat([y, y])
        tasks[f"bare passes, {network.name}"] = bare_passes(network.model, both, setting)
        tasks[f"sampler, {network.name}"] = real_sampling(network, setting, y.tolist(), folder)
    return tasks


def bare_passes(model: nn.Module, inputs: tuple[Tensor, ...], setting: Setting) -> Task:
    def run() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            for _ in range(SAMPLER_STEPS):
                model(*inputs)

    return run


def real_sampling(network: Network, setting: Setting, labels: list[int], folder: Path) -> Task:
    config = make_config(network, setting, folder)
    run = Run(network.model, build_diffusion(config), SPEC, config)
    sampling, runtime = sampling_from(config), Runtime(setting.device)
    count = setting.batch_size

    def sample() -> None:
        set_mode(network.model, training=False)
        for _ in generate(
            run, range(count), labels, sampling=sampling, batch_size=count, runtime=runtime
        ):
            pass

    return sample


def sampler_rows(networks: list[Network], times: Times) -> Iterator[dict[str, Any]]:
    for network in networks:
        value = ratio(times, f"sampler, {network.name}", f"bare passes, {network.name}")
        yield {"network": network.name, "sampler, x bare passes": value}


# --- guidance


def guidance_tasks(networks: list[Network], setting: Setting) -> dict[str, Task]:
    tasks = {}
    for network in networks:
        for count in GUIDANCE_BATCHES:
            name = f"{count}, {network.name}"
            tasks[f"guided {name}"] = guided_step(network.model, setting, count)
            tasks[f"two passes {name}"] = two_passes(network.model, setting, count)
    return tasks


def guided_step(model: nn.Module, setting: Setting, count: int) -> Task:
    x, t, y = setting.inputs(count)
    denoise = make_denoiser(build_diffusion(Config()), model, y, cfg_scale=CFG_SCALE)
    timestep = int(t[0])

    def step() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            denoise(x, timestep)

    return step


def two_passes(model: nn.Module, setting: Setting, count: int) -> Task:
    """What `guided_step` computes, the network called for each half by itself."""
    x, t, y = setting.inputs(count)
    process, times = build_diffusion(Config()), t[:1].expand(count).clone()
    null = torch.full_like(y, NULL_LABEL)

    def step() -> None:
        set_mode(model, training=False)
        with torch.inference_mode(), autocast(setting.precision, setting.device):
            out_y, out_null = model(x, times, y).float(), model(x, times, null).float()
            output = out_null + CFG_SCALE * (out_y - out_null)
            x_0 = process.predict(output, x, times).x_0
            process.with_x_0(threshold_x_0(x_0, "static"), x, times)

    return step


def guidance_rows(networks: list[Network], times: Times) -> Iterator[dict[str, Any]]:
    for network in networks:
        row = {"network": network.name}
        for count in GUIDANCE_BATCHES:
            name = f"{count}, {network.name}"
            value = ratio(times, f"two passes {name}", f"guided {name}")
            row[f"batch {count}, x two passes"] = value
        yield row


# --- the program


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    parser.add_argument("--only", nargs="+", choices=SECTIONS, default=SECTIONS)
    parser.add_argument("--family", nargs="+", choices=FAMILIES, default=FAMILIES)
    parser.add_argument("--gflops", type=float, default=0.8, help="of one image's forward pass")
    parser.add_argument("--dtype", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument("--compile", choices=["model", "blocks"], help="each compiled, too")
    parser.add_argument("--channels_last", action="store_true")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    torch.set_num_threads(args.threads)
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    setting = Setting(torch.device(args.device), args.dtype, layout, args.batch_size)
    report = Report(describe(args, PACKAGES))
    with tempfile.TemporaryDirectory() as folder:
        measure(args, setting, report, Path(folder))
    report.finish(args.json)


def measure(args: argparse.Namespace, setting: Setting, report: Report, folder: Path) -> None:
    networks = make_networks(args.family, args.gflops)
    for network in networks:
        place(network, setting)
    if args.compile:
        networks += [compiled(network, args.compile) for network in networks]
    ours = [network for network in networks if network.name in REFERENCES.values()]
    make_tasks: dict[str, Callable[[], dict[str, Task]]] = {
        "networks": lambda: network_tasks(networks, setting),
        "loop": lambda: loop_tasks(ours, setting, folder),
        "sampler": lambda: sampler_tasks(ours, setting, folder),
        "guidance": lambda: guidance_tasks(ours, setting),
    }
    tasks: dict[str, Task] = {}
    for section in args.only:
        tasks |= make_tasks[section]()
    times = run_rounds(tasks, rounds=args.rounds, clock=clock_of(setting.device))
    if "networks" in args.only:
        report.table("Networks at about equal FLOPs", list(network_rows(networks, setting, times)))
        report.table("DiM, x our DiT's images per second", dim_rows(networks, times))
    if "loop" in args.only:
        report.table("Time of the training loop", list(loop_rows(ours, times)))
    if "sampler" in args.only:
        report.table("Time of guided sampling", list(sampler_rows(ours, times)))
    if "guidance" in args.only:
        report.table("Speed of a guided step", list(guidance_rows(ours, times)))


if __name__ == "__main__":
    main()
