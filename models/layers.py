"""Embeddings and small helpers that the backbones share."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

MAX_PERIOD = 10_000.0


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (Vaswani et al. 2017) of t (B,): (B, dim) float32, dim even."""
    half = dim // 2
    frequencies = torch.exp(
        torch.arange(half, dtype=torch.float32, device=t.device) * (-math.log(MAX_PERIOD) / half)
    )
    angles = t.float()[:, None] * frequencies
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """t (B,) int64 -> (B, dim): sinusoidal features and a two-layer network."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.num_features)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """y (B,) int64 in [-1, K) -> (B, dim). Row 0 is the null label's, row y + 1 that of class y.

    The shift by one exists here and nowhere else.
    """

    def __init__(self, num_classes: int, dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y + 1)


def zero_init(module: nn.Module) -> nn.Module:
    """Zero a layer's parameters, so that the branch it ends starts as nothing."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module
