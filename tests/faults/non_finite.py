"""NaN and inf in the loss or in a gradient, on any process."""

from __future__ import annotations

import itertools
from functools import partial
from pathlib import Path
from typing import Any

import torch

from tests.faults.harness import Fault, Figure, Lab, count_bad
from utils.checkpoint import CURRENT, load_checkpoint
from utils.errors import EXIT_NON_FINITE, EXIT_OK

BAD_STEP = 8  # counted from 0; the last checkpoint before it is of step 8 or less
PLACES = {"1 process": (1, 0), "rank 0 of 2": (2, 0), "rank 1 of 2": (2, 1)}
SKIPPED = (("nan", "loss", "rank 1 of 2"), ("inf", "gradient", "rank 0 of 2"))
CASES = list(itertools.product(("nan", "inf"), ("loss", "gradient"), PLACES))


def non_finite_values(lab: Lab, trials: int) -> list[Figure]:
    """No optimizer step is taken with them, all processes say 41, the last file is finite."""
    chosen = [CASES[i * len(CASES) // trials] for i in range(trials)]
    bad, detail = count_bad([partial(stop_at, lab, *case) for case in chosen])
    figures = [Figure("nan or inf in loss or gradient", trials, bad, "steps taken", detail)]
    if trials == len(CASES):
        bad, detail = count_bad([partial(skip_at, lab, *case) for case in SKIPPED])
        label = "the same with on_nonfinite=skip: goes on"
        figures.append(Figure(label, len(SKIPPED), bad, "steps taken", detail))
    return figures


def start_poisoned(
    lab: Lab, value: str, where: str, place: str, *overrides: str
) -> tuple[list[int], Path]:
    """(exit codes, the run's folder).

    Raises:
        Fault: an optimizer step was taken with such a value, or made one.
    """
    processes, rank = PLACES[place]
    name = lab.new_name(value)
    taken = lab.folder / f"{name}_taken"
    inject = {
        "poison": {"value": value, "where": where, "step": BAD_STEP, "rank": rank},
        "watch": {"path": str(taken)},
    }
    codes = lab.start(name, *overrides, processes=processes, inject=inject).finish()
    if taken.exists():
        raise Fault(f"{value} in {where}, {place}: {taken.read_text(encoding='utf-8')[:100]}")
    return codes, lab.run_dir(name)


def stop_at(lab: Lab, value: str, where: str, place: str) -> None:
    label = f"{value} in {where}, {place}"
    codes, folder = start_poisoned(lab, value, where, place)
    if set(codes) != {EXIT_NON_FINITE}:
        raise Fault(f"{label}: exit codes {codes}, wanted {EXIT_NON_FINITE}")
    if not 0 < lab.check_newest(folder, len(codes)) <= BAD_STEP:
        raise Fault(f"{label}: no checkpoint from before the fault")
    check_finite(folder / CURRENT, label)


def skip_at(lab: Lab, value: str, where: str, place: str) -> None:
    label = f"{value} in {where}, {place}, skipped"
    options = ("on_nonfinite=skip", f"max_steps={2 * BAD_STEP}")
    codes, folder = start_poisoned(lab, value, where, place, *options)
    if set(codes) != {EXIT_OK}:
        raise Fault(f"{label}: exit codes {codes}")
    if (step := load_checkpoint(folder / CURRENT)["step"]) != 2 * BAD_STEP:
        raise Fault(f"{label}: the last file is of step {step}")
    check_finite(folder / CURRENT, label)


def check_finite(path: Path, label: str) -> None:
    todo: list[Any] = [load_checkpoint(path)]
    while todo:
        value = todo.pop()
        if isinstance(value, dict):
            todo += value.values()
        elif isinstance(value, torch.Tensor) and not bool(torch.isfinite(value).all()):
            raise Fault(f"{label}: the last file holds non-finite numbers")
