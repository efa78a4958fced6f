"""What single techniques bring, each beside another way of doing the same.

python -m benchmarks.effects
python -m benchmarks.effects --rounds 31 --json effects.jsonl
python -m benchmarks.effects --only ema optimizer
python -m benchmarks.effects --device cuda --batch_size 128

ema         one foreach call beside a loop over the state_dict and one over the parameters
optimizer   fused AdamW beside foreach and the loop; clipping the gradient norm
data        resident images beside Pillow and a DataLoader; their share of a training step
attention   scaled_dot_product_attention beside its definition
precision   bf16 autocast beside fp32
checkpoint  what a training waits for, beside a blocking torch.save; wall clock
memory      a malloc that keeps what is freed, as in our scripts, beside its defaults; CPU and glibc
            only, and every turn a process of its own, so fewer rounds

The two ways run in every round, in an order drawn anew; ratios are taken within rounds.
"""

from __future__ import annotations

import argparse
import copy
import functools
import os
import platform
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import transforms

from benchmarks.networks import CANDIDATES, OUR_DIT, OUR_UNET
from benchmarks.tasks import (
    Network,
    Setting,
    make_config,
    make_images,
    make_network,
    make_trainer,
    place,
    repeated,
    training_step,
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
    set_up,
    share,
    show_progress,
)
from datasets.loader import batches, make_resident
from datasets.storage import InMemoryDataset
from diffusion import build_process
from training.ema import EMA
from training.objective import training_examples
from training.trainer import Trainer
from utils.checkpoint import save_checkpoint
from utils.distributed import Runtime, keep_freed_memory

WIDTHS = {OUR_UNET: 32, OUR_DIT: 128, "our DiM": 128}  # 0.84, 0.81 and 0.59 GFLOP
DATA_BATCH_SIZE = 128
ATTENTION_SHAPE = (16, 4, 256, 64)  # batch, heads, tokens, channels of a head
EMA_DECAY = 0.9999
STEPS_PER_SAVE = 4
CHILD_WARM_UP, CHILD_STEPS = 5, 25  # training steps of a turn in a process of its own
CHILD_SHARE = 3  # one such turn to so many rounds


class Section(NamedTuple):
    """What to time and what to compare.

    Attributes:
        pairs: (what it is, the task that is ours, the task beside it).
        parts: (what it is, a task, the task of which it is a part).
    """

    tasks: dict[str, Task]
    pairs: list[tuple[str, str, str]]
    parts: list[tuple[str, str, str]]


def make_networks(setting: Setting, *names: str) -> list[Network]:
    networks = [make_network(c, WIDTHS[c.name]) for c in CANDIDATES if c.name in names]
    for network in networks:
        place(network, setting)
    return networks


# --- EMA and optimizer


def over_state_dict(average: nn.Module, model: nn.Module) -> None:
    ours, theirs = average.state_dict(), model.state_dict()
    for name, value in ours.items():
        value.copy_(EMA_DECAY * value + (1 - EMA_DECAY) * theirs[name])


@torch.no_grad()
def over_parameters(average: nn.Module, model: nn.Module) -> None:
    for ours, theirs in zip(average.parameters(), model.parameters(), strict=True):
        ours.lerp_(theirs, 1 - EMA_DECAY)


def ema(setting: Setting, folder: Path) -> Section:
    section = Section({}, [], [])
    for network in make_networks(setting, OUR_UNET, OUR_DIT):
        model, name = network.model, network.name
        section.tasks[f"step {name}"] = training_step(model, setting)
        section.tasks[f"ema {name}"] = functools.partial(EMA(model, EMA_DECAY).update, model)
        section.parts.append((f"EMA, {name}", f"ema {name}", f"step {name}"))
        ways = {"state_dict loop": over_state_dict, "parameter loop": over_parameters}
        for way, loop in ways.items():
            average = copy.deepcopy(model).requires_grad_(False)
            section.tasks[f"ema {way} {name}"] = functools.partial(loop, average, model)
            section.pairs.append((f"EMA, {name}, {way}", f"ema {name}", f"ema {way} {name}"))
    return section


def optimizer(setting: Setting, folder: Path) -> Section:
    section = Section({}, [], [])
    ways = {"fused": {"fused": True}, "foreach": {"foreach": True}, "loop": {"foreach": False}}
    for network in make_networks(setting, OUR_UNET, OUR_DIT):
        name = network.name
        section.tasks[f"step {name}"] = training_step(network.model, setting)
        section.parts.append((f"fused AdamW, {name}", f"fused {name}", f"step {name}"))
        for way, options in ways.items():
            parameters = with_gradients(network.model)
            section.tasks[f"{way} {name}"] = torch.optim.AdamW(parameters, **options).step
            if way != "fused":
                section.pairs.append(
                    (f"fused AdamW, {name}, {way}", f"fused {name}", f"{way} {name}")
                )
        for way, foreach in (("clip", True), ("clip loop", False)):
            section.tasks[f"{way} {name}"] = functools.partial(
                nn.utils.clip_grad_norm_, with_gradients(network.model), 1.0, foreach=foreach
            )
        section.pairs.append((f"clipping, {name}, loop", f"clip {name}", f"clip loop {name}"))
    return section


def with_gradients(model: nn.Module) -> list[nn.Parameter]:
    """Copies of the parameters, with gradients."""
    parameters = list(copy.deepcopy(model).parameters())
    for parameter in parameters:
        parameter.grad = torch.randn_like(parameter)
    return parameters


# --- data


class PillowDataset(Dataset):
    """An image in memory, as a picture, through the usual transforms."""

    def __init__(self, images: InMemoryDataset) -> None:
        self.arrays, self.labels = images.images.cpu().permute(0, 2, 3, 1).numpy(), images.labels
        half = (0.5, 0.5, 0.5)
        self.transform = transforms.Compose(
            [
                transforms.RandomHorizontalFlip(),
                transforms.ToTensor(),
                transforms.Normalize(half, half),
            ]
        )

    def __len__(self) -> int:
        return len(self.arrays)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.transform(Image.fromarray(self.arrays[index])), int(self.labels[index])


def data(setting: Setting, folder: Path) -> Section:
    images = make_images(setting.device)
    ours = batches(
        images,
        batch_size=DATA_BATCH_SIZE,
        seed=0,
        device=setting.device,
        rows=slice(0, DATA_BATCH_SIZE),
        horizontal_flip=True,
        num_workers=0,
    )
    loader = DataLoader(PillowDataset(images), DATA_BATCH_SIZE, shuffle=True)
    theirs = endless(loader)
    label = f"batch of {DATA_BATCH_SIZE}, Pillow and DataLoader"
    section = Section(
        {"resident": lambda: next(ours), "pillow": lambda: next(theirs)},
        [(label, "resident", "pillow")],
        [],
    )
    for network in make_networks(setting, OUR_UNET, OUR_DIT):
        config, name = make_config(network, setting, folder), network.name
        runtime = Runtime(setting.device)
        resident = make_resident(images, runtime)
        examples = training_examples(config, build_process(config), resident, runtime)
        section.tasks[f"step {name}"] = training_step(network.model, setting)
        section.tasks[f"example {name}"] = functools.partial(next, examples)
        section.parts.append(
            (f"images, flips, t, noise, labels, {name}", f"example {name}", f"step {name}")
        )
    return section


def endless(loader: DataLoader) -> Iterator[list[Tensor]]:
    while True:
        yield from loader


# --- attention and precision


def by_definition(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    weights = (q @ k.transpose(-1, -2) * q.shape[-1] ** -0.5).softmax(-1)
    return weights @ v


def attention(setting: Setting, folder: Path) -> Section:
    section = Section({}, [], [])
    dtype = torch.bfloat16 if setting.device.type == "cuda" else torch.float32
    qkv = torch.randn(3, *ATTENTION_SHAPE, device=setting.device, dtype=dtype)
    qkv.requires_grad_()
    ways = {"sdpa": F.scaled_dot_product_attention, "definition": by_definition}
    for way, function in ways.items():
        section.tasks[f"{way} forward"] = functools.partial(inference, function, qkv)
        section.tasks[f"{way} and backward"] = functools.partial(gradient, function, qkv)
    for kind in ("forward", "and backward"):
        section.pairs.append(
            (f"attention, {kind}, by definition", f"sdpa {kind}", f"definition {kind}")
        )
    return section


def inference(function: Callable[..., Tensor], qkv: Tensor) -> None:
    with torch.inference_mode():
        function(*qkv)


def gradient(function: Callable[..., Tensor], qkv: Tensor) -> None:
    torch.autograd.grad(function(*qkv).sum(), qkv)


def precision(setting: Setting, folder: Path) -> Section:
    section = Section({}, [], [])
    for network in make_networks(setting, OUR_UNET, OUR_DIT):
        for name in ("fp32", "bf16"):
            changed = setting._replace(precision=name)
            section.tasks[f"{name} {network.name}"] = training_step(network.model, changed)
        label = f"training step in bf16, {network.name}, fp32"
        section.pairs.append((label, f"bf16 {network.name}", f"fp32 {network.name}"))
    return section


# --- checkpoint


def checkpoint(setting: Setting, folder: Path) -> Section:
    """Some steps of training, with a checkpoint at their beginning."""
    section = Section({}, [], [])
    images = make_images(setting.device)
    for network in make_networks(setting, OUR_UNET, OUR_DIT):
        trainer = make_trainer(network, setting, images, folder, ema=True)
        step, name = training_step(network.model, setting), network.name
        step()
        trainer.learner.optimizer.step()
        path = folder / f"{name}.pth"
        steps = repeated(step, STEPS_PER_SAVE)
        ways = {"steps": None, "save": trainer.save}
        ways["torch.save"] = functools.partial(plain_save, trainer, path)
        for way, save in ways.items():
            task = steps if save is None else functools.partial(save_and_train, save, steps)
            section.tasks[f"{way} {name}"] = task
        label = f"{STEPS_PER_SAVE} steps and a checkpoint, {name}, torch.save"
        section.pairs.append((label, f"save {name}", f"torch.save {name}"))
        label = f"the same, no checkpoint, {name}"
        section.pairs.append((label, f"save {name}", f"steps {name}"))
    return section


def save_and_train(save: Task, steps: Task) -> None:
    save()
    steps()


def plain_save(trainer: Trainer, path: Path) -> None:
    """Atomic and flushed, as ours, but all at once."""
    save_checkpoint(path, trainer.state_dict())


# --- memory


def child(name: str, setting: Setting, *, keep: bool) -> None:
    """Print the CPU seconds of a training step."""
    if keep:
        keep_freed_memory()
    (network,) = make_networks(setting, name)
    step = training_step(network.model, setting)
    for _ in range(CHILD_WARM_UP):
        step()
    start = time.process_time()
    for _ in range(CHILD_STEPS):
        step()
    print((time.process_time() - start) / CHILD_STEPS)


def memory(args: argparse.Namespace) -> tuple[Section, Times]:
    """Unlike the other sections it comes with its times."""
    section, times = Section({}, [], []), {}
    for name in WIDTHS:
        ours, other = f"kept {name}", f"returned {name}"
        times |= {ours: [], other: []}
        label = f"training step, freed memory kept, {name}, glibc's defaults"
        section.pairs.append((label, ours, other))
    generator, order = random.Random(0), list(times)
    rounds = max(2, args.rounds // CHILD_SHARE)
    for number in range(rounds):
        generator.shuffle(order)
        for task in order:
            way, _, name = task.partition(" ")
            times[task].append(seconds_of_child(name, args, keep=way == "kept"))
        show_progress(number + 1, rounds)
    return section, times


def seconds_of_child(name: str, args: argparse.Namespace, *, keep: bool) -> float:
    command = [sys.executable, "-m", "benchmarks.effects", "--child", name]
    command += ["--batch_size", str(args.batch_size), "--threads", str(args.threads)]
    command += ["--keep"] if keep else []
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    output = subprocess.run(
        command, check=True, capture_output=True, text=True, env=environment
    ).stdout
    return float(output.split()[-1])


# --- the program

SECTIONS: dict[str, Callable[[Setting, Path], Section]] = {
    "ema": ema,
    "optimizer": optimizer,
    "data": data,
    "attention": attention,
    "precision": precision,
    "checkpoint": checkpoint,
}
MEMORY = "memory"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add_options(parser)
    names = (*SECTIONS, MEMORY)
    parser.add_argument("--only", nargs="+", choices=names, default=names)
    parser.add_argument("--child", choices=list(WIDTHS), help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    return parser


def main() -> None:
    args = make_parser().parse_args()
    set_up(args)
    device = torch.device(args.device)
    setting = Setting(device, "fp32", torch.contiguous_format, args.batch_size)
    if args.child:
        child(args.child, setting, keep=args.keep)
        return
    report = Report(describe(args))
    with tempfile.TemporaryDirectory() as folder:
        results = list(measure(args, setting, Path(folder)))
    report.table(
        "Effects",
        [
            {
                "effect beside": label,
                "ms": 1000 * median(times[ours]),
                "ms beside": 1000 * median(times[other]),
                "x faster": ratio(times, other, ours),
            }
            for section, times in results
            for label, ours, other in section.pairs
        ],
    )
    report.table(
        "Parts of a training step",
        [
            {"part": label, "ms": 1000 * median(times[part]), "%": share(times, part, step)}
            for section, times in results
            for label, part, step in section.parts
        ],
    )
    report.finish(args.json)


def measure(
    args: argparse.Namespace, setting: Setting, folder: Path
) -> Iterator[tuple[Section, Times]]:
    for name in args.only:
        if name == MEMORY:
            if setting.device.type == "cpu" and platform.libc_ver()[0] == "glibc":
                yield memory(args)
            continue
        section = SECTIONS[name](setting, folder)
        clock = time.perf_counter if name == "checkpoint" else clock_of(setting.device)
        yield section, run_rounds(section.tasks, rounds=args.rounds, clock=clock)


if __name__ == "__main__":
    main()
