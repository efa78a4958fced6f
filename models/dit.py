"""DiT, the diffusion transformer (Peebles and Xie 2023), adaLN-Zero, on pixels."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import layers
from models.layers import LabelEmbedding
from utils.config_types import BelowOne, PositiveFloat, PositiveInt

INIT_STD = 0.02  # of the timestep embedding; labels have 1, as short runs then learn them

# Table 1 of the paper; the number after the slash is the patch size.
_WIDTHS = {"S": (384, 12, 6), "B": (768, 12, 12), "L": (1024, 24, 16), "XL": (1152, 28, 16)}
SIZES = {
    f"DiT-{name}/{patch}": dict(patch_size=patch, hidden_size=width, depth=depth, num_heads=heads)
    for name, (width, depth, heads) in _WIDTHS.items()
    for patch in (2, 4, 8)
}
DEFAULT = "DiT-S/2"
LAYER_NORM = partial(nn.LayerNorm, eps=1e-6, elementwise_affine=False)
RMS_NORM = partial(nn.RMSNorm, eps=1e-6)


class Attention(nn.Module):
    """Multi-head self-attention over all tokens (B, N, D).

    With `qk_norm` an RMSNorm per head normalises queries and keys. A table `rotations`, as of
    `layers.rotary_table` for D / heads channels, rotates them by the positions of their tokens.
    A ValueError is raised if `num_heads` does not divide D.
    """

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool = False) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"num_heads={num_heads} does not divide hidden_size={dim}")
        self.num_heads = num_heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = RMS_NORM(dim // num_heads) if qk_norm else None
        self.k_norm = RMS_NORM(dim // num_heads) if qk_norm else None
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, rotations: Tensor | None = None) -> Tensor:
        qkv = self.qkv(x).unflatten(2, (3, self.num_heads, -1))  # (B, N, 3, heads, D / heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # (B, heads, N, D / heads)
        if self.q_norm is not None:
            q, k = self.q_norm(layers.at_least_fp32(q)), self.k_norm(layers.at_least_fp32(k))
        if rotations is not None:
            q, k = layers.rotate(q, rotations), layers.rotate(k, rotations)
        out = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        return self.proj(out.transpose(1, 2).flatten(2))


class DiTBlock(nn.Module):
    """Attention and MLP, each normalised, shifted, scaled and gated by the conditioning.

    `norm` makes a normalisation of so many channels; `mlp` a network from tokens to tokens, of the
    arguments of `layers.MLP`.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        mlp_ratio: float,
        dropout: float,
        *,
        norm: Callable[[int], nn.Module] = LAYER_NORM,
        mlp: Callable[[int, int, float], nn.Module] = layers.MLP,
        qk_norm: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = norm(dim)
        self.attention = Attention(dim, num_heads, qk_norm=qk_norm)
        self.dropout = nn.Dropout(dropout)
        self.norm2 = norm(dim)
        self.mlp = mlp(dim, layers.mlp_width(dim, mlp_ratio), dropout)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x: Tensor, c: Tensor, rotations: Tensor | None = None) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c).chunk(6, dim=1)
        h = layers.modulate(self.norm1(x), shift1, scale1)
        h = self.dropout(self.attention(h, rotations))
        x = torch.addcmul(x, gate1[:, None], h)
        h = self.mlp(layers.modulate(self.norm2(x), shift2, scale2))
        return torch.addcmul(x, gate2[:, None], h)


class DiT(nn.Module):
    """A network (x_t, t, y) -> (B, out_channels, H, W). Sizes that do not fit are a ValueError.

    Args:
        img_size: (H, W) in pixels, divisible by patch_size.
        in_channels: channels of the image.
        num_classes: K; with 0 the network is unconditional.
        out_channels: default: in_channels.
        size: `DiT-S/2` ... `DiT-XL/8`, the paper's sizes: sets the four arguments after it.
        patch_size, hidden_size, depth, num_heads: default: those of DiT-S/2.
        mlp_ratio: hidden width of the MLPs over hidden_size.
        dropout: probability after attention and within the MLPs.
        activation_checkpointing: recompute blocks in backward: less memory for one more forward.
    """

    computing_params = ("activation_checkpointing",)  # they say how it is computed, not what

    def __init__(
        self,
        *,
        img_size: tuple[int, int],
        in_channels: int,
        num_classes: int = 0,
        out_channels: int | None = None,
        size: Literal[tuple(SIZES)] | None = None,
        patch_size: PositiveInt | None = None,
        hidden_size: PositiveInt | None = None,
        depth: PositiveInt | None = None,
        num_heads: PositiveInt | None = None,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: BelowOne = 0.0,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        args = dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth)
        args["num_heads"] = num_heads
        patch_size, hidden_size, depth, num_heads = layers.from_size(size, SIZES, DEFAULT, args)
        self.img_size, self.patch_size = tuple(img_size), patch_size
        self.grid = layers.patch_grid(self.img_size, patch_size)
        self.activation_checkpointing = activation_checkpointing
        out_channels = out_channels or in_channels

        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        positions = layers.sincos_positions(self.grid, hidden_size)
        self.register_buffer("positions", positions, persistent=False)
        self.time_embedding = layers.TimestepEmbedding(layers.NUM_TIME_FEATURES, hidden_size)
        self.label_embedding = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, dropout) for _ in range(depth)
        )
        self.final_norm = LAYER_NORM(hidden_size)
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, patch_size**2 * out_channels)
        init_weights(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        layers.check_image_size(x, self.img_size)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        c = self.time_embedding(t)
        if self.label_embedding is not None:
            c = c + self.label_embedding(y)
        c = F.silu(c)  # (B, D)
        for block in self.blocks:
            x = layers.run_block(block, x, c, recompute=self.activation_checkpointing)
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.out(layers.modulate(self.final_norm(x), shift, scale))  # (B, N, p * p * C)
        return layers.unpatchify(x, self.grid, self.patch_size)


def init_weights(model: nn.Module) -> None:
    """Draw the weights of a DiT or a JiT: its fresh blocks are identities, its output is 0."""
    layers.init_weights(model)
    for layer in (model.time_embedding.mlp[0], model.time_embedding.mlp[2]):
        nn.init.normal_(layer.weight, std=INIT_STD)
