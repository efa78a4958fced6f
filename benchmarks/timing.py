"""What the benchmarks share: rounds that are fair to all, the machine they ran on, and tables."""

from __future__ import annotations

import argparse
import gc
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from utils.precision import allow_tf32

SHORTEST = 0.05  # seconds: a shorter task is repeated within its turn
ISA = ("avx2", "avx512f", "avx512_bf16", "amx_bf16")

Task = Callable[[], object]
Clock = Callable[[], float]  # seconds
Times = dict[str, list[float]]  # task -> seconds of one run of it, a value per round


class Ratio(NamedTuple):
    """Median and quartiles of the ratios of single rounds."""

    low: float
    middle: float
    high: float

    def __str__(self) -> str:
        return f"{self.middle:.3g} ({self.low:.3g} to {self.high:.3g})"


def ratio(times: Times, above: str, below: str, factor: float = 1.0) -> Ratio:
    """Seconds of `above` over seconds of `below`, round by round, times `factor`."""
    pairs = zip(times[above], times[below], strict=True)
    return Ratio(*statistics.quantiles([factor * a / b for a, b in pairs], n=4, method="inclusive"))


def share(times: Times, part: str, whole: str) -> Ratio:
    """`part` in percent of `whole`."""
    return ratio(times, part, whole, 100)


def clock_of(device: torch.device) -> Clock:
    """CPU: the process's CPU time, which other processes do not stretch; CUDA: the wall clock."""
    return time.process_time if device.type == "cpu" else _wall_clock_of_gpu


def _wall_clock_of_gpu() -> float:
    torch.cuda.synchronize()
    return time.perf_counter()


def run_rounds(
    tasks: Mapping[str, Task], *, rounds: int, clock: Clock, shortest: float = SHORTEST
) -> Times:
    """Time every task in every round, in an order drawn anew for each.

    Args:
        shortest: seconds that one turn takes at least, by repetition.
    """
    generator = random.Random(0)
    repeats = {name: _warm_up(task, clock, shortest) for name, task in tasks.items()}
    times: Times = {name: [] for name in tasks}
    order = list(tasks)
    for number in range(rounds):
        generator.shuffle(order)
        for name in order:
            times[name].append(_seconds(tasks[name], clock, repeats[name]))
        show_progress(number + 1, rounds)
    return times


def show_progress(number: int, rounds: int) -> None:
    if sys.stderr.isatty():
        end = "\n" if number == rounds else ""
        print(f"\rround {number} of {rounds}", end=end, file=sys.stderr, flush=True)


def _warm_up(task: Task, clock: Clock, shortest: float) -> int:
    """Run a task twice; returns how often it fits into one turn."""
    task()
    return max(1, round(shortest / max(_seconds(task, clock, 1), 1e-6)))


def _seconds(task: Task, clock: Clock, repeats: int) -> float:
    gc.collect()
    gc.disable()
    try:
        start = clock()
        for _ in range(repeats):
            task()
        return (clock() - start) / repeats
    finally:
        gc.enable()


class ForeignLoad:
    """What other processes use meanwhile, in cores. Linux; elsewhere unknown."""

    def __init__(self) -> None:
        self._busy, self._own, self._wall = _busy_seconds(), _own_seconds(), time.monotonic()

    def cores(self) -> float | None:
        if self._busy is None:
            return None
        wall = max(time.monotonic() - self._wall, 1e-9)
        foreign = (_busy_seconds() - self._busy) - (_own_seconds() - self._own)
        return max(0.0, foreign / wall)


def _busy_seconds() -> float | None:
    path = Path("/proc/stat")
    if not path.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq = map(
        int, path.read_text(encoding="ascii").split()[1:8]
    )
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


def _own_seconds() -> float:
    return sum(os.times()[:4])


def add_options(parser: argparse.ArgumentParser, *, rounds: int = 15) -> None:
    parser.add_argument("--rounds", type=int, default=rounds, help="at least 2")
    parser.add_argument("--batch_size", type=int, default=4)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--json", type=Path, metavar="PATH", help="write every row as a JSON line")


def set_up(args: argparse.Namespace) -> None:
    """The threads asked for, and TF32, with which the scripts train on GPUs."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        allow_tf32()


def describe(args: argparse.Namespace, packages: Sequence[str] = ()) -> dict[str, Any]:
    """The machine and the versions."""
    names = ("torch", *packages)
    versions = {name: metadata.version(name) for name in names if _is_installed(name)}
    facts: dict[str, Any] = {"cpu": _cpu_name(), "cores": os.cpu_count(), "threads": args.threads}
    if args.device == "cuda":
        facts["gpu"] = torch.cuda.get_device_name()
    clock = "process CPU time" if args.device == "cpu" else "wall clock"
    return {
        **facts,
        "instructions": _instructions(),
        "python": platform.python_version(),
        **versions,
        "commit": _commit(),
        "clock": clock,
        "rounds": args.rounds,
        "batch_size": args.batch_size,
    }


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def _cpu_lines(field: str) -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    found = (line.partition(":")[2].strip() for line in lines if line.startswith(field))
    return next(found, "")


def _cpu_name() -> str:
    return _cpu_lines("model name") or platform.processor() or platform.machine()


def _instructions() -> str:
    flags = _cpu_lines("flags").split()
    return " ".join(name for name in ISA if name in flags)


def _commit() -> str:
    def git(*arguments: str) -> str:
        command = ["git", *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    root = Path(__file__).resolve().parents[1]
    changed = git("-C", str(root), "status", "--porcelain", "--untracked-files=no")
    return git("-C", str(root), "rev-parse", "--short", "HEAD") + (
        " and changes" if changed else ""
    )


def _show(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if isinstance(value, float) else str(value)


class Report:
    """Prints Markdown tables and keeps their rows for a file of JSON lines."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self._lines: list[dict[str, Any]] = [{"table": "machine", **facts}]
        self._load = ForeignLoad()
        print(", ".join(f"{name}: {value}" for name, value in facts.items()), flush=True)

    def table(self, title: str, rows: Sequence[Mapping[str, Any]]) -> None:
        """Every row has the same keys, which become the columns. Numbers get three digits."""
        if not rows:
            return
        print(f"\n{title}\n\n| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
        for row in rows:
            print(f"| {' | '.join(map(_show, row.values()))} |")
        sys.stdout.flush()
        self._lines += [{"table": title, **row} for row in rows]

    def finish(self, path: Path | None) -> None:
        cores = self._load.cores()
        known = "unknown" if cores is None else f"{cores:.2f} cores on average"
        print(f"\nother processes meanwhile: {known}")
        self._lines[0]["foreign_cores"] = cores
        if path is not None:
            text = "".join(json.dumps(line) + "\n" for line in self._lines)
            path.write_text(text, encoding="utf-8")
