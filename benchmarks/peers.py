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
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch import nn

from benchmarks.networks import CANDIDATES, OUR_DIT, REFERENCES, choose_width, saved_bytes
from benchmarks.tasks import (
    COMPILED,
    LOOP_STEPS,
    ROOF_SIDES,
    Network,
    Setting,
    bare_passes,
    compiled,
    few_steps,
    forward_pass,
    guided_step,
    make_images,
    make_network,
    make_trainer,
    matrix_product,
    place,
    real_sampling,
    repeated,
    sampling_step,
    training_step,
    two_passes,
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
)
from utils.cli import COMPILE_MODES
from utils.distributed import keep_freed_memory
from utils.precision import autocast

SECTIONS = ("networks", "loop", "sampler", "guidance")
FAMILIES = tuple(REFERENCES)
PACKAGES = ("diffusers", "denoising-diffusion-pytorch")
GUIDANCE_BATCHES = (1, 4, 16)
ROOF = "matrix product"
MIB = 2**20


def make_networks(families: list[str], gflops: float) -> list[Network]:
    """The candidates of some families at the width nearest to `gflops`."""
    dit, networks = next(c for c in CANDIDATES if c.name == OUR_DIT), []
    for candidate in CANDIDATES:
        if candidate.family not in families:
            continue
        sized = candidate if candidate.widths else dit
        try:
            networks.append(make_network(candidate, choose_width(sized, 1e9 * gflops)))
        except ModuleNotFoundError as error:
            print(f"{candidate.name}: left out, {error}", flush=True)
    return networks


# --- networks

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
    roof = 2e-9 * ROOF_SIDES[setting.device.type] ** 3 / median(times[ROOF])  # GFLOP/s
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
    parser.add_argument("--compile", choices=COMPILE_MODES, help="each compiled, too")
    parser.add_argument("--channels_last", action="store_true")
    return parser


def main() -> None:
    args = make_parser().parse_args()
    set_up(args)
    if args.device == "cpu":
        keep_freed_memory()  # as our scripts do; it serves every network here
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
