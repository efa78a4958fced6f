"""Embeddings and small helpers that the backbones share."""

from __future__ import annotations

import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

MAX_PERIOD = 10_000.0
NUM_TIME_FEATURES = 256  # of a transformer's timestep embedding


def timestep_features(t: Tensor, dim: int) -> Tensor:
    """Sinusoidal features (B, dim) float32 of t (B,), for an even dim (Vaswani et al. 2017)."""
    half = dim // 2
    numbers = torch.arange(half, dtype=torch.float32, device=t.device)
    angles = t.float()[:, None] * torch.exp(numbers * (-math.log(MAX_PERIOD) / half))
    return torch.cat([angles.cos(), angles.sin()], dim=1)


class TimestepEmbedding(nn.Module):
    """Embeds t (B,) int64 as (B, dim), by sinusoidal features and a network of two layers."""

    def __init__(self, num_features: int, dim: int) -> None:
        super().__init__()
        self.num_features = num_features
        self.mlp = nn.Sequential(nn.Linear(num_features, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t: Tensor) -> Tensor:
        features = timestep_features(t, self.num_features)
        return self.mlp(features.to(self.mlp[0].weight.dtype))


class LabelEmbedding(nn.Module):
    """Embeds labels y (B,) int64 in [-1, K) as (B, dim): row 0 is the null label's, row y + 1 that
    of class y. The shift by one exists here and nowhere else."""

    def __init__(self, num_classes: int, dim: int, *, std: float = 1.0) -> None:
        super().__init__()
        self.table = nn.Embedding(num_classes + 1, dim)
        nn.init.normal_(self.table.weight, std=std)

    def forward(self, y: Tensor) -> Tensor:
        return self.table(y + 1)


def zero_init(module: nn.Module) -> nn.Module:
    """Set a layer's parameters to 0, so that the branch that it ends adds nothing at first."""
    for parameter in module.parameters():
        nn.init.zeros_(parameter)
    return module


def init_weights(model: nn.Module) -> None:
    """Draw the weights of a DiT, JiT or DiM, but for those of mixers, which have drawn their own.
    What modulates fresh blocks is 0, and so is the output."""
    drawn = [
        module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and ".mixer." not in name
    ]
    drawn += [module for module in model.patch_embedding.modules() if isinstance(module, nn.Conv2d)]
    for layer in drawn:
        nn.init.xavier_uniform_(layer.weight.flatten(1))
        if layer.bias is not None:
            nn.init.zeros_(layer.bias)
    modulations = [*(block.modulation for block in model.blocks), model.final_modulation]
    for layer in filter(None, (*modulations, model.out)):
        zero_init(layer)


def patch_grid(image_size: tuple[int, int], patch_size: int) -> tuple[int, int]:
    """How many patches lie along the height and along the width. Raises a ValueError if they do
    not tile the image."""
    height, width = image_size
    if height % patch_size or width % patch_size:
        message = f"patch_size={patch_size} does not divide the image size {image_size}"
        raise ValueError(f"{message}; choose a divisor of both sides, or another image_size")
    return height // patch_size, width // patch_size


def sincos_positions(grid: tuple[int, int], dim: int) -> Tensor:
    """Fixed sinusoidal positions (h * w, dim): half of dim tells the row, the other the column.
    Raises a ValueError unless dim is a multiple of 4."""
    if dim % 4:
        raise ValueError(f"hidden_size={dim}: the positions need a multiple of 4")
    h, w = grid
    rows, columns = (timestep_features(torch.arange(side), dim // 2) for side in grid)
    return torch.cat([rows.repeat_interleave(w, 0), columns.repeat(h, 1)], dim=1)


def rotary_table(grid: tuple[int, int], dim: int, num_fixed: int = 0) -> Tensor:
    """Rotary positions (RoPE, Su et al. 2021) of tokens on a grid, for `rotate`: the cosines and
    the sines (2, num_fixed + h * w, dim / 2), of angles that grow with the row in the first half
    of the channels and with the column in the second. The `num_fixed` tokens before the grid do not
    turn. Raises a ValueError unless dim, the channels of a head, is a multiple of 4."""
    if dim % 4:
        raise ValueError(f"rope=True needs heads of a multiple of 4 channels, not {dim}")
    axes = sincos_positions(grid, dim).unflatten(1, (2, 2, -1))  # (N, axis, cos or sin, dim / 4)
    table = axes.permute(2, 0, 1, 3).flatten(2)
    return torch.cat([table[:, :1].expand(-1, num_fixed, -1), table], dim=1)  # patch 0 has angle 0


def rotate(x: Tensor, table: Tensor) -> Tensor:
    """Turn each pair of channels (i, i + d / 2) of x (..., N, d) by its angle in `table`, so that
    products of tokens depend on the offsets between their positions alone."""
    (cos, sin), (first, second) = table, x.chunk(2, dim=-1)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def unpatchify(patches: Tensor, grid: tuple[int, int], patch_size: int) -> Tensor:
    """Put patches (B, h * w, p * p * C) together to images (B, C, h * p, w * p)."""
    (h, w), p = grid, patch_size
    image = patches.unflatten(2, (p, p, -1)).unflatten(1, (h, w))  # (B, h, w, p, p, C)
    return image.permute(0, 5, 1, 3, 2, 4).reshape(patches.shape[0], -1, h * p, w * p)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Shift and scale tokens x (B, N, D) by (B, D) each: x (1 + scale) + shift."""
    return torch.addcmul(shift[:, None], x, 1 + scale[:, None])


def at_least_fp32(tensor: Tensor) -> Tensor:
    """The tensor in float32, or in float64 if it is: 8 bits of mantissa are too few for decays,
    step sizes and norms."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def gelu(x: Tensor) -> Tensor:
    """GELU in its usual approximation by tanh (Hendrycks and Gimpel 2016)."""
    if not torch.compiler.is_compiling():
        return F.gelu(x, approximate="tanh")
    # The same, as (1 + tanh(u)) / 2 = sigmoid(2u): compiled for a CPU, an exp is far cheaper.
    u = math.sqrt(2 / math.pi) * x * (1 + 0.044715 * x * x)
    return x * torch.sigmoid(2 * u)


class MLP(nn.Module):
    """Linear, GELU, linear, with dropout after both."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden_dim)
        self.fc2 = nn.Linear(hidden_dim, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.fc2(self.dropout(gelu(self.fc1(x)))))


class SwiGLU(nn.Module):
    """A gated MLP (Shazeer 2020) with as many weights as an MLP of `hidden_dim`, which leaves two
    thirds of it, and dropout before its last layer. Raises a ValueError if that is no channel."""

    def __init__(self, dim: int, hidden_dim: int, dropout: float) -> None:
        super().__init__()
        width = 2 * hidden_dim // 3
        if not width:
            raise ValueError(f"SwiGLU leaves nothing of hidden width {hidden_dim}; raise mlp_ratio")
        self.fc1 = nn.Linear(dim, 2 * width)
        self.fc2 = nn.Linear(width, dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(self.dropout(F.silu(gate) * value))


def check_image_size(x: Tensor, image_size: tuple[int, int]) -> None:
    """Raise a ValueError unless images x (B, C, H, W) have the size (H, W) that a model is for."""
    if tuple(x.shape[2:]) != image_size:
        needed, given = "x".join(map(str, image_size)), "x".join(map(str, x.shape[2:]))
        raise ValueError(f"this model is for images of {needed} pixels, got {given}")


def from_size(
    size: str | None,
    sizes: Mapping[str, Mapping[str, int]],
    default: str,
    given: Mapping[str, int | None],
) -> list[int]:
    """The values of the arguments `given`, in their order: all those of a named size, or else each
    one as it was given, or that of the default size where it is None. Raises a ValueError for an
    argument beside a `size` that sets it."""
    clashing = ", ".join(name for name, value in given.items() if value is not None)
    if size is not None and clashing:
        raise ValueError(f"size={size!r} already sets {clashing}; leave out one or the other")
    table = sizes[size or default]
    return [table[name] if value is None else value for name, value in given.items()]


def mlp_width(hidden_size: int, mlp_ratio: float) -> int:
    """The hidden width of an MLP: `mlp_ratio` times `hidden_size`; 0, for no MLP, only if the ratio
    is 0, else a ValueError is raised."""
    width = int(hidden_size * mlp_ratio)
    if mlp_ratio and not width:
        raise ValueError(f"mlp_ratio={mlp_ratio} of {hidden_size} channels is less than one")
    return width


def run_block(block: nn.Module, *inputs: Tensor | None, recompute: bool) -> Tensor:
    """The output of a block; with `recompute`, backward computes its activations once more."""
    if recompute and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False)
    return block(*inputs)
