"""Quality against compute: our configs and other packages' recipes, each with the same CPU seconds.

pip install -r benchmarks/requirements.txt
python -m benchmarks.learning --data_root data
python -m benchmarks.learning --arenas cifar16 mnist28 --cifar cifar_folders --data_root data
python -m benchmarks.learning --budget 25 50 --contestants "UNet, flow" "diffusers, course"

A budget is process CPU seconds of training on one thread. What a step costs is measured first, the
contestants in turn, by two processes side by side, as the runs are later; the median says how many
steps each gets. One budget is run with its half, quarter and eighth, each with a schedule of its
own length. The judge is a classifier of the real train images that none of the contestants knows.
Runs and samples that are done are kept in the folder --work and not made again.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.learning_judge import Court, compute_needed, draw_curves, judge_of
from benchmarks.learning_peer import (
    COMMON,
    GUIDED,
    GUIDED_STEPS,
    OWN,
    PASSES,
    PEERS,
    batches_of,
    count_of,
    drawn_file,
    read_images,
)
from benchmarks.objectives import run
from benchmarks.peers import PACKAGES
from benchmarks.tasks import LOOP_STEPS, few_steps, repeated
from benchmarks.timing import Report, Task, describe, run_rounds
from datasets.real import real_sets
from training.build import build_trainer
from training.job import prepare
from training.learner import Learner
from training.run_dir import Status
from training.saving import LOSS, BestScore
from training.trainer import Trainer
from utils.config import Config, load_config
from utils.distributed import Runtime, keep_freed_memory
from utils.errors import EXIT_OK, DataError, exit_code_of
from utils.files import write_npz, write_text

ROUNDS = 2  # of the speed probe, in each of its two processes
MIN_SAMPLES = 12  # half of them have 5 neighbours each
NEVER = 10**6
SETTING = dict(threads=1, device="cpu", rounds=ROUNDS, batch_size="as each has it")
QUIET = dict(epochs=NEVER, save_interval=NEVER, sample_interval=NEVER, log_interval=NEVER)
Result = dict[str, Any]


class Arena(NamedTuple):
    """Images, as overrides of a config say them; `unets` are what a UNet needs for their size."""

    title: str
    overrides: tuple[str, ...]
    unets: tuple[str, ...] = ()
    flip: bool = False


ARENAS = {
    "mnist16": Arena("MNIST at 16 pixels", ("dataset=mnist", "image_size=16")),
    "cifar16": Arena("CIFAR-10 at 16 pixels", ("dataset=custom", "image_size=16"), flip=True),
    "mnist28": Arena(
        "MNIST at 28 pixels",
        ("dataset=mnist", "image_size=28"),
        unets=("model_params.attention_resolutions=7,",),
    ),
}
# Shipped configs; what is behind a name changes their size and nothing else.
NARROW = "model_params.model_channels=16"
OURS: dict[str, tuple[str, ...]] = {
    "UNet": ("digits_unet.py",),
    "UNet, width 16": ("digits_unet.py", NARROW),
    "UNet, flow": ("digits_flow.py",),
    "UNet, flow, width 16": ("digits_flow.py", NARROW),
    "DiT": ("digits_dit.py",),
    "JiT": ("digits_jit.py",),
    "DiM": ("digits_dim.py",),
}
BY_DEFAULT = tuple(name for name in (*OURS, *PEERS) if name != "UNet, flow")


def trainer_of(config: Config) -> Trainer:
    """As train.py puts it together."""
    config.run_dir.mkdir(parents=True, exist_ok=True)
    job, best = prepare(config, Runtime(torch.device("cpu"))), BestScore(LOSS, lower_is_better=True)
    return build_trainer(job, Learner(job), Status(None), best=best, evaluate=None, preview=None)


# --- arithmetic


def budgets_of(given: Sequence[float]) -> list[float]:
    """Ascending; a single one with its half, quarter and eighth."""
    return sorted(given) if len(given) > 1 else [given[0] / part for part in (8, 4, 2, 1)]


def steps_for(budget: float, seconds: Sequence[float], interval: int = 1) -> int:
    """How many steps the budget buys at the median of these seconds each: whole intervals and 1."""
    return 1 + interval * max(0, round((budget / median(seconds) - 1) / interval))


# --- runs


class Bench:
    """The runs in one arena, in a folder of its own."""

    def __init__(self, name: str, args: argparse.Namespace) -> None:
        self.name, self.args, self.arena = name, args, ARENAS[name]
        self.work = (args.work / name).resolve()
        self._peers = [contestant for contestant in args.contestants if contestant in PEERS]
        self.work.mkdir(parents=True, exist_ok=True)
        root = args.cifar if name == "cifar16" else args.data_root
        roots = [f"data_root={root}"] if root else []
        self.overrides = [*self.arena.overrides, *roots, f"save_dir={self.work}"]
        self._file = self.work / "results.json"
        self.results: Result = json.loads(self._file.read_text()) if self._file.exists() else {}

    def keep(self, key: str, value: Any) -> None:
        self.results[key] = value
        write_text(self._file, json.dumps(self.results, indent=1))

    def config_of(self, name: str, steps: int) -> tuple[str, list[str]]:
        """Config file and overrides of one of ours. Warm-up is the share that it is as shipped."""
        file, *size = OURS[name]
        unets, path = self.arena.unets if name.startswith("UNet") else (), f"configs/{file}"
        shipped = load_config(path)
        share = shipped.warmup_epochs / shipped.epochs
        warmup = share * steps * shipped.batch_size / self.results["images"]
        settings = QUIET | {"max_steps": steps, "warmup_epochs": warmup}
        given = [f"{key}={value}" for key, value in settings.items()]
        return path, [*self.overrides, *unets, *size, *given]

    def probe(self, path: Path) -> None:
        """Write seconds of a training step, a value for each round and contestant."""
        keep_freed_memory()
        tasks: dict[str, Task] = {}
        images, labels = self.images("train")
        for name in self.args.contestants:
            if name in OURS:
                file, overrides = self.config_of(name, NEVER)
                own = f"experiment_name={path.stem}_{self.folder(name).name}"
                tasks[name] = few_steps(trainer_of(load_config(file, [*overrides, own])))
            else:
                peer = PEERS[name](tuple(images.shape[1:]), int(labels.max()) + 1)
                batches = batches_of(images, labels, peer.batch_size, flip=self.arena.flip)
                tasks[name] = repeated(partial(peer.step, batches), LOOP_STEPS)
        times = run_rounds(tasks, rounds=ROUNDS, clock=time.process_time, shortest=0)
        seconds = {name: [value / LOOP_STEPS for value in values] for name, values in times.items()}
        write_text(path, json.dumps(seconds))

    def images(self, split: str) -> tuple[Tensor, Tensor]:
        """uint8 (N, C, H, W) and labels (N,), kept in the folder."""
        path = self.work / f"{split}.npz"
        if not path.exists():
            runtime = Runtime(torch.device("cpu"))
            sets = real_sets(load_config("configs/digits_unet.py", self.overrides), runtime, 500)
            for part in (sets.train, sets.test):
                pixels, classes = part.load(range(len(part.dataset)))
                arrays = {"arr_0": pixels.permute(0, 2, 3, 1).numpy(), "arr_1": classes.numpy()}
                write_npz(self.work / f"{part.split}.npz", **arrays)
        return read_images(path)

    def measure_speed(self) -> None:
        """Probe the contestants whose speed is not known yet, by two processes at a time."""
        speeds = self.results.setdefault("seconds of a step", {})
        if set(self.args.contestants) <= speeds.keys():
            return
        paths = [self.work / f"probe_{number}.json" for number in range(2)]
        jobs = [[*self.args.command, "--arenas", self.name, "--probe", path] for path in paths]
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda job: run("-m", "benchmarks.learning", *job), jobs))
        times = [json.loads(path.read_text()) for path in paths]
        for name in self.args.contestants:
            speeds.setdefault(name, [*times[0][name], *times[1][name]])
        self.keep("seconds of a step", speeds)

    def steps(self, name: str, budget: float) -> int:
        interval = PEERS[name].func.interval if name in PEERS else 1
        return steps_for(budget, self.results["seconds of a step"][name], interval)

    def run_peer(self, name: str) -> Path:
        """Train one of other packages', and draw its samples. Returns the folder of these."""
        folder, steps = self.folder(name), [self.steps(name, b) for b in self.args.budget]
        given = [name, self.work / "train.npz", folder, "--steps", *steps]
        given += ["--samples", self.args.samples]
        run("-m", "benchmarks.learning_peer", *given, *["--flip"] * self.arena.flip)
        return folder

    def run_ours(self, name: str, budget: float) -> Path:
        """Train one of ours, and draw its samples. Returns the folder of these."""
        folder, steps, samples = self.folder(name), self.steps(name, budget), self.args.samples
        trained, kinds = folder / str(steps), {COMMON: (PASSES, "--cfg_scale", 1)}
        if budget == self.args.budget[-1]:
            kinds[GUIDED] = (GUIDED_STEPS,)  # at the scale of the config
        if not (trained / "done").exists():
            shutil.rmtree(trained, ignore_errors=True)
            file, overrides = self.config_of(name, steps)
            names = [f"save_dir={folder}", f"experiment_name={steps}"]
            seconds = run("train.py", "--config", file, "--device", "cpu", *overrides, *names)
            write_text(trained / "done", f"{seconds:.1f} CPU seconds with the start")
        for kind, sampling in kinds.items():
            path, output = drawn_file(folder, steps, kind, samples), trained / kind
            if not path.exists():
                method = ["--sampling_method", "ddim", "--num_inference_steps", *sampling]
                files = ["--checkpoint", trained / "current_model.pth", "--output_dir", output]
                many = ["--npz", "--num_samples", samples, "--batch_size", 250]
                run("sample.py", *files, *many, *method, "--device", "cpu")
                os.replace(next(output.glob("*.npz")), path)
        return folder

    def folder(self, name: str) -> Path:
        return self.work / "".join(c if c.isalnum() else "_" for c in name)

    def measure(self) -> None:
        """Make and score what is not in the results yet."""
        (images, labels), test = self.images("train"), self.images("test")
        self.keep("images", len(images))
        judge = judge_of(self.work / "judge.pt", images, labels, flip=self.arena.flip)
        court = Court(judge, images)
        self.keep("judge", court.verdict(*test)["accuracy"])
        self.keep("real", court.verdict_of_some(*test, self.args.samples))
        self.measure_speed()
        ours = [name for name in self.args.contestants if name in OURS]
        jobs = [partial(self.run_peer, name) for name in self._peers]
        jobs += [partial(self.run_ours, n, b) for b in reversed(self.args.budget) for n in ours]
        with ThreadPoolExecutor(2) as pool:
            for done in as_completed([pool.submit(job) for job in jobs]):
                for path in sorted(done.result().glob("*.npz")):
                    key = f"{path.parent.name} {path.stem}"
                    if key not in self.results:
                        self.keep(key, court.verdict(*read_images(path)))
                        print(key, self.results[key], flush=True)

    def result(self, name: str, budget: float, kind: str) -> Result | None:
        count = count_of(kind, self.args.samples)
        path = drawn_file(self.folder(name), self.steps(name, budget), kind, count)
        return self.results.get(f"{path.parent.name} {path.stem}")

    def curves(self) -> dict[str, list[tuple[float, float]]]:
        """(budget, distance) of each contestant, by `PASSES` passes."""
        return {
            name: [(b, self.result(name, b, COMMON)["distance"]) for b in self.args.budget]
            for name in self.args.contestants
        }

    def rows(self) -> list[dict[str, Any]]:
        """The table, at the largest budget. The best peer's distance is by whichever sampler."""
        last, images = self.args.budget[-1], count_of(OWN, self.args.samples)
        theirs = [self.result(n, last, k) for n in self._peers for k in (COMMON, OWN)]
        peers = [result["distance"] for result in theirs if result]
        rows = []
        for name, curve in self.curves().items():
            plain, guided, own = (self.result(name, last, k) for k in (COMMON, GUIDED, OWN))
            row = {"contestant": name, "steps": self.steps(name, last)}
            if name in OURS:  # `PASSES` steps are their own as shipped
                own = {"distance": plain["of a share"]}
            row[f"FD, own sampler, {images} images"] = own and own["distance"]
            row[f"FD, {PASSES} passes"] = plain["distance"]
            interval = f"({plain['low']:.3f} to {plain['high']:.3f})"
            row["right class (95 %)"] = f"{plain['accuracy']:.3f} {interval}"
            row["recall"] = plain["recall"]
            row |= {f"guided: {key}": guided and guided[key] for key in ("accuracy", "distance")}
            row["compute to peers' best FD"] = compute_needed(curve, min(peers)) if peers else None
            rows.append(row | {f"FD at {budget:g}": distance for budget, distance in curve[:-1]})
        return rows


# --- the program


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--work", type=Path, default=Path("learning"), help="folder for all that is made")
    add("--budget", type=float, nargs="+", default=[100.0], help="CPU seconds of training")
    add("--samples", type=int, default=500, help="images drawn and scored of each")
    add("--arenas", nargs="+", choices=ARENAS, help="default: mnist16, and cifar16 with --cifar")
    add("--contestants", nargs="+", choices=[*OURS, *PEERS], default=list(BY_DEFAULT))
    add("--data_root", help="folder of MNIST; default: the config's")
    add("--cifar", type=Path, metavar="FOLDER", help="train/ and test/ with a folder per class")
    add("--probe", type=Path, help=argparse.SUPPRESS)
    return parser


def is_there(name: str) -> bool:
    """Whether this contestant can run; says so where its package is missing."""
    package = name.partition(",")[0]
    missing = name in PEERS and find_spec(package.replace("-", "_")) is None
    if missing:
        print(f"{name}: left out, {package} is not installed; see benchmarks/requirements.txt")
    return not missing


def main(argv: Sequence[str] | None = None) -> int:
    command = list(sys.argv[1:] if argv is None else argv)
    args = (parser := make_parser()).parse_args(command)
    if min(args.budget) <= 0 or args.samples < MIN_SAMPLES:
        parser.error(f"--budget is above 0, --samples at least {MIN_SAMPLES}")
    args.budget, args.command = budgets_of(args.budget), command
    args.contestants = [name for name in args.contestants if is_there(name)]
    os.environ["TQDM_DISABLE"] = "1"
    torch.set_num_threads(1)
    for name in args.arenas or ["mnist16", *["cifar16"] * (args.cifar is not None)]:
        if name == "cifar16" and args.cifar is None:
            print(f"{name}: left out, name its folder by --cifar")
            continue
        try:
            bench = Bench(name, args)
            if args.probe:
                bench.probe(args.probe)
                return EXIT_OK
            report = Report(describe(argparse.Namespace(**SETTING), PACKAGES))
            bench.measure()
        except DataError as error:
            print(f"{name}: left out, {error}")
            continue
        real, right = bench.results["real"]["distance"], bench.results["judge"]
        title = f"{bench.arena.title}, {args.budget[-1]:g} CPU seconds. Of real test images "
        title += f"{right:.3f} are judged right; the FD of {args.samples} of them is {real:.2f}"
        report.table(title, bench.rows())
        report.finish(bench.work / "table.jsonl")
        draw_curves(bench.work / "curves.png", bench.arena.title, bench.curves(), real)
    return EXIT_OK


if __name__ == "__main__":
    sys.exit(exit_code_of(main))
