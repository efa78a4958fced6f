"""Runs the battery and prints one table. Exit code 1 if any figure is not what is wanted.

python -m tests.faults                    all of it
python -m tests.faults --quick            about two minutes
python -m tests.faults --only 1,4 --keep  some rows; the scratch folder stays
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from tests.faults import (
    bad_configs,
    checkpoint_files,
    disk,
    inputs,
    kills,
    non_finite,
    pickles,
    sameness,
    trackers,
)
from tests.faults.harness import Fault, Figure, Lab


class Row(NamedTuple):
    """A function that makes figures, and how many trials it gets; 0 leaves it out."""

    number: int
    measure: Callable[[Lab, int], Figure | list[Figure]]
    trials: int
    quick_trials: int


ROWS = (
    Row(1, kills.kill_one_process, 20, 2),
    Row(1, kills.kill_ranks, 5, 1),
    Row(1, kills.kill_job, 5, 0),
    Row(2, checkpoint_files.kill_writers, 100, 30),
    Row(3, checkpoint_files.damage_files, 400, 400),
    Row(3, checkpoint_files.every_bit, 10**6, 1000),
    Row(3, checkpoint_files.fall_back, 10, 5),
    Row(4, kills.stop_one_process, 12, 2),
    Row(4, kills.stop_two_processes, 12, 0),
    Row(4, kills.stop_twice, 3, 0),
    Row(5, pickles.malicious_files, 24, 20),
    Row(5, inputs.traversals, 1, 1),
    Row(5, inputs.hostile_images, 1, 1),
    Row(6, disk.full_disk, 20, 5),
    Row(7, non_finite.non_finite_values, 12, 2),
    Row(8, sameness.options_around, 9, 1),
    Row(9, trackers.trackers, 5, 1),
    Row(10, bad_configs.mutated_configs, 100, 50),
    Row(11, sameness.world_sizes, 1, 0),
    Row(12, sameness.sharded, 1, 0),
)


class Result(NamedTuple):
    number: int
    figure: Figure
    seconds: float


def main(argv: Sequence[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="faults-"))
    lab, results, began = Lab(folder, args.seed), [], time.monotonic()
    try:
        for row in ROWS:
            trials = row.quick_trials if args.quick else row.trials
            if trials and (not args.only or row.number in args.only):
                print(f"{row.number}: {row.measure.__name__}", file=sys.stderr, flush=True)
                results += measure(row, lab, trials)
    finally:
        lab.close()
    text, seconds = table(results), time.monotonic() - began
    print(f"{text}\n\n{verdict(results)}, {seconds:.0f} s")
    if args.json:
        rows = [{"row": r.number, **r.figure._asdict(), "seconds": r.seconds} for r in results]
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(rows, indent=2) + "\n", encoding="utf-8")
    failed = any(result.figure.bad for result in results)
    if args.keep or failed:
        print(f"all runs and their outputs: {folder}")
    else:
        shutil.rmtree(folder)
    return int(failed)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="fewer trials: about two minutes")
    parser.add_argument("--only", type=numbers, metavar="1,4", help="these rows")
    parser.add_argument("--seed", type=int, default=0, help="of the moments and places of faults")
    parser.add_argument("--json", type=Path, help="write the figures to this file, too")
    parser.add_argument("--keep", action="store_true", help="keep the scratch folder")
    return parser


def numbers(text: str) -> set[int]:
    return {int(part) for part in text.split(",")}


def measure(row: Row, lab: Lab, trials: int) -> list[Result]:
    """The figures of one row; the seconds stand with the first of them."""
    began = time.monotonic()
    try:
        found = row.measure(lab, trials)
    except Exception as error:
        if not isinstance(error, Fault):
            traceback.print_exc()
        found = Figure(row.measure.__name__, trials, trials, "not run", repr(error))
    figures = [found] if isinstance(found, Figure) else found
    seconds = [time.monotonic() - began] + [0.0] * (len(figures) - 1)
    return [Result(row.number, *pair) for pair in zip(figures, seconds, strict=True)]


def table(results: Sequence[Result]) -> str:
    """A Markdown table, with a list of details below."""
    head = ("", "fault", "trials", "bad", "seconds")
    rows = [
        (
            str(number),
            figure.name,
            str(figure.trials) if figure.trials else "skipped",
            f"{figure.bad} {figure.kind}",
            f"{seconds:.0f}" if seconds else "",
        )
        for number, figure, seconds in results
    ]
    widths = [max(map(len, column)) for column in zip(head, *rows, strict=True)]
    rule = tuple("-" * width for width in widths)
    lines = [
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |"
        for row in (head, rule, *rows)
    ]
    details = [
        f"{'BAD ' if f.bad else ''}{number} {f.name}: {f.detail}"
        for number, f, _ in results
        if f.detail
    ]
    return "\n".join([*details, "", *lines])


def verdict(results: Sequence[Result]) -> str:
    bad = [result.figure for result in results if result.figure.bad]
    good = f"{len(results) - len(bad)} of {len(results)} figures are as wanted"
    return good if not bad else f"{good}; not: {', '.join(figure.name for figure in bad)}"


if __name__ == "__main__":
    sys.exit(main())
