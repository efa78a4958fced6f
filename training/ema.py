"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from training.sharding import local_parameters


class EMA:
    """A second, frozen copy of a model that follows it; `.model` is always in eval mode.

    The n-th update uses decay min(decay, (1 + n) / (10 + n)), so that a short run does not stay
    near its random initialisation. Every rank keeps its own copy of the same numbers, or, of a
    sharded model, the average of its slices.
    """

    def __init__(self, model: nn.Module, decay: float) -> None:
        # a sharded parameter's deep copy would come with a process group of its own
        clones = {id(p): nn.Parameter(p.detach().clone()) for p in model.parameters()}
        self.model = copy.deepcopy(model, clones).eval().requires_grad_(False)
        self.decay, self.num_updates = decay, 0

    def state_dict(self) -> dict[str, Any]:
        """The average's part of a checkpoint: all that sampling needs."""
        state = self.model.state_dict()
        return {"ema_model_state_dict": state, "ema_num_updates": self.num_updates}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        decay = min(self.decay, (1 + self.num_updates) / (10 + self.num_updates))
        self.num_updates += 1
        ours, theirs = local_parameters(self.model), local_parameters(model)
        torch._foreach_lerp_(ours, theirs, 1 - decay)
        for our_buffer, buffer in zip(self.model.buffers(), model.buffers(), strict=True):
            our_buffer.copy_(buffer)
