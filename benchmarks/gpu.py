"""What only a GPU can show, in four parts that fit into a quarter of an hour together.

make gpu
make gpu PARTS="tests speed" GPU_PYTHON=python3 GPU_WHEELS=wheels
python -m benchmarks.gpu --minutes 14 --results checkpoints/gpu.jsonl
python -m benchmarks.gpu --fill docs/performance.md checkpoints/gpu.jsonl

tests     the tests that need a GPU (at most 3 minutes)
speed     images per second of the networks of configs/, each compiled in several ways (4)
peers     our UNet and DiT beside those of other packages, in bf16 (2)
cifar10   training until the time is up, a grid, and an evaluation of 2,000 images (the rest)

Each part is a process of its own. What it measures is a line of the results at once, so a part that
fails or runs out of time takes nothing from the others. `--fill` writes the newest lines of each
part into a page, between its two comments.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import shlex
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.networks import CHANNELS, NUM_CLASSES, SIDE, count_flops, draw_inputs, fill_zeros
from benchmarks.tasks import (
    ROOF_SIDES,
    SAMPLER_STEPS,
    Network,
    Setting,
    matrix_product,
    real_sampling,
    training_step,
)
from benchmarks.timing import clock_of, describe, run_rounds, set_up
from generation.run import CONFIG_CHECKS
from models import build_model, compile_model
from utils.config import load_config
from utils.errors import ConfigError, one_line
from utils.images import ImageSpec

ROOT = Path(__file__).resolve().parents[1]
SPEC = ImageSpec(CHANNELS, SIDE, SIDE, NUM_CLASSES)
GRACE = 30  # seconds that a process has to save and end, once it is asked to
WARM_UPS = 3  # a CUDA graph is recorded in the second run
OUTCOME = re.compile(r"^(\S+::.+?) (PASSED|FAILED|ERROR|SKIPPED)\b", re.MULTILINE)
BEGIN, END = "<!-- begin: results of make gpu -->", "<!-- end: results of make gpu -->"
FACTS = "gpu", "cpu", "python", "torch", "commit"
NOT_RUN = "Not run on a GPU yet."

Row = dict[str, Any]
Write = Callable[[Row], None]


class Variant(NamedTuple):
    """A network of configs/ and how to run it."""

    name: str
    config: str
    mode: str | None = None
    channels_last: bool = False
    settings: tuple[str, ...] = ()

    def label(self) -> str:
        parts = [self.mode or "eager", *["channels_last"] * self.channels_last]
        return ", ".join(parts)


SCAN = "model_params.mamba_backend="
VARIANTS = (  # what needs no compiling comes first
    Variant("UNet", "cifar10_unet"),
    Variant("DiT-S/2", "cifar10_dit"),
    Variant("JiT", "cifar10_jit"),
    Variant("DiM, scan in Triton", "cifar10_dim", settings=(f"{SCAN}triton",)),
    Variant("DiM, scan in PyTorch", "cifar10_dim", settings=(f"{SCAN}torch",)),
    Variant("UNet", "cifar10_unet", "blocks"),
    Variant("UNet", "cifar10_unet", "graphs"),
    Variant("UNet", "cifar10_unet", "blocks", channels_last=True),
    Variant("DiT-S/2", "cifar10_dit", "blocks"),
    Variant("DiT-S/2", "cifar10_dit", "graphs"),
    Variant("JiT", "cifar10_jit", "graphs"),
)
TINY = {
    "cifar10_unet": ["model_params.model_channels=16", "model_params.channel_mult=[1,1]"],
    "cifar10_dit": ["model_params.hidden_size=96", "model_params.depth=1"],
}


# --- the parts


def run(command: Sequence[object], seconds: float, log: Path) -> int | None:
    """Run Python with these arguments, its output in `log`; returns the exit code, or None if it
    was ended because its time was up."""
    with log.open("w", encoding="utf-8") as output:
        child = subprocess.Popen(
            [sys.executable, *map(str, command)],
            cwd=ROOT,
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        try:
            return child.wait(max(seconds, 1))
        except subprocess.TimeoutExpired:
            os.killpg(child.pid, signal.SIGTERM)  # which train.py answers by saving
            with contextlib.suppress(subprocess.TimeoutExpired):
                child.wait(GRACE)
            return None
        finally:
            if child.poll() is None:
                os.killpg(child.pid, signal.SIGKILL)
                child.wait()


def check(code: int | None, log: Path) -> None:
    """Raise a RuntimeError that says how the process ended, unless it did well."""
    if code is None:
        raise RuntimeError("its time was up")
    if code:
        lines = log.read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((line for line in reversed(lines) if line.strip()), "")
        raise RuntimeError(f"exit code {code}: {one_line(last)}")


def tests(args: argparse.Namespace, seconds: float, write: Write) -> None:
    log = args.results.with_name("gpu_tests.log")
    which = ["tests/test_gpu.py"] if args.tiny else []
    code = run(["-m", "pytest", "-m", "gpu", "-vv", *which], seconds, log)
    outcomes = OUTCOME.findall(log.read_text(encoding="utf-8", errors="replace"))
    words = [word for _, word in outcomes]
    row = {"passed": words.count("PASSED"), "skipped": words.count("SKIPPED")}
    write(row | {"failed": [name for name, word in outcomes if word in ("FAILED", "ERROR")]})
    check(code, log)


def speed(args: argparse.Namespace, seconds: float, write: Write) -> None:
    log = args.results.with_name("gpu_speed.log")
    command = ["-m", "benchmarks.gpu", "--measure", "--device", args.device]
    command += ["--results", args.results, *["--tiny"] * args.tiny]
    check(run(command, seconds, log), log)


def peers(args: argparse.Namespace, seconds: float, write: Write) -> None:
    end, log = time.monotonic() + seconds, args.results.with_name("gpu_peers.log")
    families = ("dit",) if args.tiny else ("unet", "dit")
    sizes = ["--batch_size", 2, "--gflops", 0.2, "--rounds", 2]
    if not args.tiny:
        sizes = ["--batch_size", 128, "--gflops", 12, "--rounds", 7]
        sizes += ["--dtype", "bf16", "--threads", os.cpu_count()]
    for number, family in enumerate(families):
        share = (end - time.monotonic()) / (len(families) - number)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder, "peers.jsonl")
            command = ["-m", "benchmarks.peers", "--device", args.device, "--json", path]
            code = run([*command, "--only", "networks", "--family", family, *sizes], share, log)
            for row in read_lines(path):
                if "network" in row and "width" in row:
                    write(row)
        check(code, log)


def cifar10(args: argparse.Namespace, seconds: float, write: Write) -> None:
    end, folder = time.monotonic() + seconds, args.results.with_name("gpu_cifar10")
    log = args.results.with_name("gpu_cifar10.log")
    settings = ["experiment_name=gpu_cifar10", f"save_dir={args.results.parent}"]
    settings += ["resume_path=auto", "use_scheduler=false", "ema_decay=0.999", "log_interval=20"]
    settings += ["sample_interval=100000", "sample_start_epoch=100000", "save_interval=100000"]
    settings += TINY["cifar10_unet"] if args.tiny else ["channels_last=true", "compile=blocks"]
    settings += ["max_steps=3", "batch_size=8", "log_interval=1"] if args.tiny else []
    common = ["--device", args.device]
    begun = time.monotonic()
    code = run(
        ["train.py", "--config", "configs/cifar10_unet.py", *common, *settings, *args.data],
        0.6 * seconds - GRACE / 2,
        log,
    )
    lines = [row for row in read_lines(folder / "metrics.jsonl") if "train/loss" in row]
    if lines:
        last, speeds = lines[-1], [row["train/images_per_sec"] for row in lines]
        row = {"step": last["step"], "epoch": last["epoch"], "loss": last["train/loss_smoothed"]}
        row |= {"images/s": statistics.median(speeds), "seconds": time.monotonic() - begun}
        write({"training": row})
    if code is not None:
        check(code, log)  # it ends by itself only if something is wrong, or all is done
    drawn = ["--num_samples", 8 if args.tiny else 100, "--captions"]
    drawn += ["--num_inference_steps", 2] if args.tiny else []
    log = log.with_stem("gpu_grid")
    command = ["sample.py", "--checkpoint", folder, *common, "--output_dir", folder / "pictures"]
    check(run([*command, *drawn], min(60, end - time.monotonic()), log), log)
    write({"grid": str(folder / "pictures" / "samples.png")})
    count = 8 if args.tiny else 2000
    scored = ["--num_samples", count]
    scored += ["--metrics", "sanity", "--num_inference_steps", 2] if args.tiny else []
    log = log.with_stem("gpu_evaluation")
    command = ["evaluate.py", "--checkpoint", folder, *common, *scored]
    check(run(command, end - time.monotonic(), log), log)
    report = json.loads((folder / "eval" / "report.json").read_text(encoding="utf-8"))
    values = {name: entry["value"] for name, entry in report["metrics"].items()}
    write({"evaluation": {k: v for k, v in values.items() if v is not None}, "images": count})


# name: the function, and the most minutes it may take; None: all that is left
PARTS: dict[str, tuple[Callable[[argparse.Namespace, float, Write], None], float | None]] = {
    "tests": (tests, 3),
    "speed": (speed, 4),
    "peers": (peers, 2),
    "cifar10": (cifar10, None),
}


def run_parts(args: argparse.Namespace) -> int:
    """Run the parts one after the other. Returns how many of them had a problem."""
    end, problems = time.monotonic() + 60 * args.minutes, 0
    facts = describe(argparse.Namespace(**vars(args), threads=1, rounds=None, batch_size=None))
    facts = {name: value for name, value in facts.items() if name in FACTS}
    args.results.parent.mkdir(parents=True, exist_ok=True)
    for name in args.parts:
        function, minutes = PARTS[name]
        left, begun = end - time.monotonic(), time.monotonic()
        write, problem = writer(args.results, name), None
        write({"begin": facts})
        print(f"{name}: {left / 60:.1f} minutes left", flush=True)
        try:
            function(args, left if minutes is None else min(left, 60 * minutes), write)
        except Exception as error:  # the other parts go on
            problem, problems = one_line(error), problems + 1
        write({"end": time.monotonic() - begun, "problem": problem})
        print(f"{name}: {problem or 'done'}, {time.monotonic() - begun:.0f} s", flush=True)
    print(f"results: {args.results}; python -m benchmarks.gpu --fill docs/performance.md ...")
    return problems


def writer(results: Path, part: str) -> Write:
    """A function that appends a row of `part` to the file, at once."""

    def write(row: Row) -> None:
        with results.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"part": part, **row}) + "\n")

    return write


def read_lines(path: Path) -> list[Row]:
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- images per second


def measure(args: argparse.Namespace) -> None:
    """Time every variant and write its row. One that cannot run here is a row that says why."""
    set_up(argparse.Namespace(threads=1, device=args.device))
    device, write = torch.device(args.device), writer(args.results, "speed")
    setting = Setting(device, "fp32" if args.tiny else "bf16", torch.contiguous_format, 128)
    setting = setting._replace(batch_size=2) if args.tiny else setting
    rounds = dict(rounds=7, clock=clock_of(device), shortest=0.2)
    rounds |= dict(rounds=2, shortest=0.01) if args.tiny else {}
    product = run_rounds({"peak": matrix_product(setting)}, **rounds)
    peak = 2 * ROOF_SIDES[device.type] ** 3 / statistics.median(product["peak"])  # FLOP/s
    for variant in VARIANTS:
        row = {"network": variant.name, "compiled": variant.label()}
        try:
            if args.tiny and (variant.config not in TINY or variant.mode is not None):
                raise ConfigError("left out by --tiny")
            write(row | images_per_second(variant, setting, rounds, peak, tiny=args.tiny))
        except Exception as error:  # the other variants go on
            write(row | {"skipped": one_line(error)})
        torch._dynamo.reset()
        if device.type == "cuda":
            torch.cuda.empty_cache()


def images_per_second(
    variant: Variant, setting: Setting, rounds: Mapping[str, Any], peak: float, *, tiny: bool
) -> Row:
    """Of training steps, and of steps of guided sampling; `peak` in FLOP/s."""
    overrides = [*variant.settings, *(TINY[variant.config] if tiny else [])]
    path = ROOT / "configs" / f"{variant.config}.py"
    overrides += [f"channels_last={variant.channels_last}"]
    config = load_config(path, overrides, checks=CONFIG_CHECKS)
    if variant.channels_last:
        setting = setting._replace(memory_format=torch.channels_last)
    torch.manual_seed(0)
    model = build_model(config, SPEC, setting.device)
    fill_zeros(model)
    flops = count_flops(model)
    compile_model(model, variant.mode)
    network = Network(variant.name, config.model_type, 0, model, flops / 1e9)
    labels = draw_inputs(setting.batch_size, setting.device)[2].tolist()
    with tempfile.TemporaryDirectory() as folder:
        tasks = {
            "train": training_step(model, setting),
            "sample": real_sampling(network, setting, labels, Path(folder)),
        }
        begun = time.perf_counter()
        for task in tasks.values():
            for _ in range(WARM_UPS):
                task()
        warm = time.perf_counter() - begun
        times = {name: statistics.median(t) for name, t in run_rounds(tasks, **rounds).items()}
    trained = setting.batch_size / times["train"]
    return {
        "M params": sum(p.numel() for p in model.parameters()) / 1e6,
        "GFLOP": flops / 1e9,
        "batch": setting.batch_size,
        "training, images/s": trained,
        "share of the peak": 3 * flops * trained / peak,
        "guided steps, images/s": SAMPLER_STEPS * setting.batch_size / times["sample"],
        "warm-up, s": warm,
    }


# --- the tables


def fill(page: Path, rows: Sequence[Row]) -> None:
    """Put what the results say between the two comments of the page; without any, that."""
    text = page.read_text(encoding="utf-8")
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not (begin and end):
        raise SystemExit(f"error: {page} has no lines {BEGIN} and {END}")
    content = "\n\n".join(paragraphs(rows))
    page.write_text(f"{before}{BEGIN}\n\n{content}\n\n{END}{after}", encoding="utf-8")


def paragraphs(rows: Sequence[Row]) -> Iterator[str]:
    newest: dict[str, list[Row]] = {}
    for row in rows:
        if "begin" in row:
            newest[row["part"]] = []
        newest[row["part"]].append(row)
    newest = {part: newest[part] for part in PARTS if part in newest}
    if not newest:
        yield NOT_RUN
    for part, lines in newest.items():
        facts, last = lines[0]["begin"], lines[-1]
        where = facts.get("gpu", f"a CPU ({facts['cpu']})")
        origin = f"{where}, torch {facts['torch']}, commit {facts['commit']}"
        problem = last.get("problem", "it was cut off")
        yield f"**{part}** ({origin})" + (f"; ended early: {problem}" if problem else "")
        measured = [line for line in lines[1:] if "end" not in line]
        yield from TABLES[part](measured) if measured else ["No results."]
    if newest and (missing := [part for part in PARTS if part not in newest]):
        yield f"{NOT_RUN[:-1]}: {', '.join(missing)}."


def tests_table(lines: Sequence[Row]) -> Iterator[str]:
    line = lines[-1]
    failed = "".join(f" `{name}`" for name in line["failed"])
    counts = f"{line['passed']} passed, {line['skipped']} skipped, {len(line['failed'])} failed"
    yield f"{counts}{':' if failed else '.'}{failed}"


def speed_table(lines: Sequence[Row]) -> Iterator[str]:
    """The peak is that of a large bf16 matrix product on the same card."""
    columns = "training, images/s", "share of the peak", "guided steps, images/s", "warm-up, s"
    done = [line for line in lines if "skipped" not in line]
    yield table(["network", "compiled", "GFLOP", *columns], done)
    skipped = [f"{x['network']}, {x['compiled']} ({x['skipped']})" for x in lines if x not in done]
    if skipped:
        yield f"Left out: {'; '.join(skipped)}."


def peers_table(lines: Sequence[Row]) -> Iterator[str]:
    kinds = "train", "forward", "CFG step"
    parts = "img/s", "ours is x faster per FLOP"
    columns = [f"{kind}: {part}" for kind in kinds for part in parts]
    yield table(["network", "width", "GFLOP", *columns, "of the roof"], lines)


def cifar10_table(lines: Sequence[Row]) -> Iterator[str]:
    values: Row = {}
    for line in lines:
        values |= line.get("training", {})
        scores = line.get("evaluation", {})
        values |= {f"{name}, {line['images']} images": value for name, value in scores.items()}
    yield table(list(values), [values])


TABLES: dict[str, Callable[[Sequence[Row]], Iterator[str]]] = {
    "tests": tests_table,
    "speed": speed_table,
    "peers": peers_table,
    "cifar10": cifar10_table,
}


def table(columns: Sequence[str], rows: Sequence[Row]) -> str:
    lines = [columns, ["---"] * len(columns)]
    lines += [[shown(row.get(column)) for column in columns] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, list):  # quartiles and median of ratios
        return f"{value[1]:.2f} ({value[0]:.2f} to {value[2]:.2f})"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return str(value)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--minutes", type=float, default=14.0, help="for all parts together")
    add("--parts", nargs="+", choices=list(PARTS), default=list(PARTS))
    add("--results", type=Path, default=Path("checkpoints/gpu.jsonl"), help="JSON lines, appended")
    add("--data", type=shlex.split, default=[], help="other images: 'dataset=custom data_root=DIR'")
    add("--device", default="cuda", choices=["cpu", "cuda"])
    add("--tiny", action="store_true", help="tiny networks: to try out the command itself")
    add("--fill", nargs="+", type=Path, metavar=("PAGE", "RESULTS"), help="fill in tables")
    add("--measure", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    args.results = args.results.resolve()
    if args.fill:
        if missing := [path for path in args.fill if not path.is_file()]:
            raise SystemExit(f"error: --fill: there is no file {missing[0]}")
        fill(args.fill[0], [row for path in args.fill[1:] for row in read_lines(path)])
        return 0
    if args.device == "cuda" and not torch.cuda.is_available():
        raise SystemExit("error: no CUDA device; --device cpu --tiny tries out the command itself")
    if args.measure:
        measure(args)
        return 0
    return 1 if run_parts(args) else 0


if __name__ == "__main__":
    sys.exit(main())
