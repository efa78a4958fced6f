"""Averages of the weights over training: one while it runs, others solved for afterwards."""

from __future__ import annotations

import copy
import logging
import math
import operator
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from itertools import groupby, product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from training.sharding import local_parts
from utils.checkpoint import misfit, read_tensors
from utils.errors import CheckpointError, ConfigError, one_line, show

WIDTHS = 0.05, 0.10  # of the averages in snapshots, those of EDM2
NARROWEST, WIDEST = 0.001, 12**-0.5  # the widest weighs all steps alike
MAX_DISTANCE = 0.03  # between the profile asked for and the one solved for, as a share of its norm

log = logging.getLogger("diffusion")


class EMA:
    """A second, frozen copy of a model that follows it; `.model` is always in eval mode.

    The n-th update uses decay min(decay, (1 + n) / (10 + n)), so that a short run does not stay
    near its random initialisation. Every rank keeps its own copy of the same numbers, or, of a
    sharded model, the average of its slices.

    `averages` has others, of the trained parameters alone, by their `widths` (see `gamma_of`), and
    `snapshots` the steps at which they went to disk, with the smoothed loss that tells runs apart.
    """

    def __init__(self, model: nn.Module, decay: float, widths: Iterable[float] = ()) -> None:
        # a sharded parameter's deep copy would come with a process group of its own
        clones = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
        self.model = copy.deepcopy(model, clones).eval().requires_grad_(False)
        self.decay, self.num_updates = decay, 0
        self._powers, trained = {w: gamma_of(w) + 1 for w in widths}, trained_parameters(model)
        self.averages = {w: {k: p.detach().clone() for k, p in trained.items()} for w in widths}
        self.snapshots: dict[int, float] = {}

    def state_dict(self) -> dict[str, Any]:
        """The averages' part of a checkpoint: all that sampling needs."""
        state = self.model.state_dict()
        others = {"ema_averages": self.averages, "ema_snapshots": self.snapshots}
        usual = {"ema_model_state_dict": state, "ema_num_updates": self.num_updates}
        return usual | (others if self.averages else {})

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        ours, theirs = local_parts(self.model.parameters()), local_parts(model.parameters())
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for our_buffer, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            our_buffer.copy_(buffer)
        theirs = local_parts(trained_parameters(model).values()) if self.averages else []
        for width, average in self.averages.items():
            decay = (1 - 1 / self.num_updates) ** self._powers[width]
            torch._foreach_lerp_(local_parts(average.values()), theirs, 1 - decay)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """The parameters that training changes, by all their names in a state dict."""
    named = model.named_parameters(remove_duplicate=False)
    return {name: parameter for name, parameter in named if parameter.requires_grad}


def snapshot_name(step: int) -> str:
    return f"ema_step_{step:08d}.pth"


def gamma_of(width: float) -> float:
    """The power gamma of an average over t steps in which step s weighs like s^gamma.

    The `width` (sigma_rel) is the standard deviation of s under these weights, as a share of t, of
    `NARROWEST` to `WIDEST` (Karras et al. 2024, arXiv 2312.02696, section 3.1 and appendix C).
    """
    return float(np.roots([1, 7, 16 - width**-2, 12 - width**-2]).real.max())


def solve(
    profiles: Sequence[tuple[int, float]], step: int, width: float
) -> tuple[list[float], float]:
    """Write the average of `width` at `step` as a sum of others, given as (step, width) each.

    A profile is the weight of each moment in an average; their least squares give a factor for
    each of the others (the same paper, section 3.2 and appendix C). Returns these, and the distance
    that is left between profiles, as a share of the norm.
    """
    times, gammas = np.array([(t / step, gamma_of(w)) for t, w in (*profiles, (step, width))]).T
    first, powers = np.minimum.outer(times, times), gammas + 1
    shares = (first / times) ** powers
    # integrals of two profiles, (gamma + 1) s^gamma / t^(gamma + 1) for s in [0, t]
    products = np.outer(powers, powers) / (np.add.outer(powers, powers) - 1) / first
    products *= shares * shares.T
    norms = np.sqrt(products.diagonal())
    products /= np.outer(norms, norms)
    of_norms = np.linalg.lstsq(products[:-1, :-1], products[:-1, -1], rcond=1e-12)[0]
    factors = of_norms / norms[:-1]
    factors /= factors.sum()  # what all averages share stays as it is
    return factors.tolist(), math.sqrt(max(1 - of_norms @ products[:-1, -1], 0))


def states_of_widths(
    path: Path, state: dict[str, Any], widths: Iterable[float]
) -> dict[float, dict[str, Any]]:
    """By width, the `state` of a checkpoint read from `path`, with the average of that width.

    It is solved for from the averages there, and those in the snapshots beside `path`. Raises a
    CheckpointError if there are none, or a snapshot is damaged or of another run, and a ConfigError
    for a width that they do not give.
    """
    own, losses, step = state.get("ema_averages"), state.get("ema_snapshots", {}), state["step"]
    if not own or not step:
        needed = "--ema_width takes a checkpoint of a run with ema_snapshots above 0"
        raise CheckpointError(f"{show(path)}: {needed}; this one holds no averages to solve from")
    weights, names = state["model_state_dict"], list(next(iter(own.values())))
    form = {width: {name: weights.get(name) for name in names} for width in own}
    if problem := misfit(own, form, "ema_averages"):
        raise CheckpointError(f"{show(path)}: {problem}")
    files = {t: path.with_name(snapshot_name(t)) for t in losses if t < step}
    steps = [*(t for t, file in files.items() if file.is_file()), step]
    if missing := sorted(files.keys() - steps):
        words = "--ema_width: snapshots that are not in %s are left out: those of steps %s"
        log.warning(words, show(path.parent), one_line(missing, 100))
    profiles = [(t, other) for t in steps for other in own]
    factors = {width: iter(_factors(profiles, step, width)) for width in widths}
    sums = {width: [torch.zeros_like(weights[name]) for name in names] for width in factors}
    for t in steps:
        averages = own if t == step else _read_snapshot(files[t], losses[t], form)
        for other, width in product(own, factors):
            added = [averages[other][name] for name in names]
            torch._foreach_add_(sums[width], added, alpha=next(factors[width]))
    averages = {w: weights | dict(zip(names, sums[w], strict=True)) for w in factors}
    return {w: state | {"ema_model_state_dict": average} for w, average in averages.items()}


def _factors(profiles: Sequence[tuple[int, float]], step: int, width: float) -> list[float]:
    def is_near(width: float) -> bool:
        return solve(profiles, step, width)[1] <= MAX_DISTANCE

    if NARROWEST <= width <= WIDEST and is_near(width):
        return solve(profiles, step, width)[0]
    tried = [number / 200 for number in range(1, 58)]
    groups = [list(group) for near, group in groupby(tried, is_near) if near]
    ranges = ", ".join("..".join(dict.fromkeys((str(g[0]), str(g[-1])))) for g in groups)
    raise ConfigError(
        f"--ema_width {width}: the {len(profiles) // 2 - 1} snapshots before step {step} give "
        f"widths of {ranges}; take one of these, or train with fewer epochs between snapshots"
    )


def _read_snapshot(
    path: Path, loss: float, form: Mapping[float, Mapping[str, Tensor]]
) -> dict[float, dict[str, Tensor]]:
    try:
        parts = read_tensors(path, needs_checksum=True)
    except Exception as error:
        reason = f"damaged ({one_line(error)}); remove it to solve from the other snapshots"
        raise CheckpointError(f"{show(path)}: {reason}") from error
    if misfit(parts, {"loss": partial(operator.eq, loss), "averages": form}):
        raise CheckpointError(f"{show(path)}: a snapshot of another run than the checkpoint")
    return parts["averages"]
