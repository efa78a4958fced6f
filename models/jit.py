"""JiT, "just image transformers" (Li and He 2025, arXiv 2511.13720): a DiT for large patches of
pixels.

A linear bottleneck before the tokens, positions that rotate queries and keys, RMSNorm, SwiGLU, and
class tokens that join the patches part of the way. What it predicts is the process's business; the
paper has it predict x_0.
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models import layers
from models.dit import INIT_STD, RMS_NORM, DiTBlock, init_weights
from models.layers import LabelEmbedding
from utils.config_types import BelowOne, NonNegativeInt, PositiveFloat, PositiveInt

# The paper's sizes; the number after the slash is the patch size.
_WIDTHS = {"B": (768, 12, 12, 128), "L": (1024, 24, 16, 128), "H": (1280, 32, 16, 256)}
SIZES = {
    f"JiT-{name}/{patch}": dict(
        patch_size=patch, hidden_size=width, depth=depth, num_heads=heads, bottleneck=bottleneck
    )
    for name, (width, depth, heads, bottleneck) in _WIDTHS.items()
    for patch in (16, 32)
}
DEFAULT = "JiT-B/16"


class JiT(nn.Module):
    """A network (x_t, t, y) -> (B, out_channels, H, W). Sizes that do not fit are a ValueError.

    Args:
        img_size: (H, W) in pixels, divisible by patch_size.
        in_channels: channels of the image.
        num_classes: K; with 0 the network is unconditional and has no class tokens.
        out_channels: default: in_channels.
        size: `JiT-B/16` ... `JiT-H/32`, the paper's sizes: sets the five arguments after it.
        patch_size, hidden_size, depth, num_heads: default: those of JiT-B/16.
        bottleneck: channels that a patch is first projected to; default: that of JiT-B/16.
        mlp_ratio: hidden width of the MLPs over hidden_size, of which SwiGLU leaves two thirds.
        dropout: probability after attention and within the MLPs, in the middle half of the blocks.
        num_class_tokens: tokens made of the class, which attend along with the patches; 0: none.
        class_tokens_at: the block, counted from 0, before which they join; default: depth // 3.
        qk_norm: normalise queries and keys by an RMSNorm per head.
        rope: rotate queries and keys by the row and column of their patch.
        swiglu: MLPs gated by SiLU; False: with GELU, as in DiT.
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
        bottleneck: PositiveInt | None = None,
        mlp_ratio: PositiveFloat = 4.0,
        dropout: BelowOne = 0.0,
        num_class_tokens: NonNegativeInt = 32,
        class_tokens_at: NonNegativeInt | None = None,
        qk_norm: bool = True,
        rope: bool = True,
        swiglu: bool = True,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        args = dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth)
        args |= dict(num_heads=num_heads, bottleneck=bottleneck)
        patch_size, hidden_size, depth, num_heads, bottleneck = layers.from_size(
            size, SIZES, DEFAULT, args
        )
        if class_tokens_at is not None and not num_class_tokens:
            raise ValueError(f"class_tokens_at={class_tokens_at}, but num_class_tokens=0 has none")
        self.class_tokens_at = depth // 3 if class_tokens_at is None else class_tokens_at
        if self.class_tokens_at >= depth:
            raise ValueError(f"class_tokens_at={class_tokens_at}: the last block is {depth - 1}")
        self.num_class_tokens = num_class_tokens if num_classes else 0
        self.img_size, self.patch_size = tuple(img_size), patch_size
        self.grid = layers.patch_grid(self.img_size, patch_size)
        self.activation_checkpointing = activation_checkpointing

        self.patch_embedding = nn.Sequential(
            nn.Conv2d(in_channels, bottleneck, patch_size, stride=patch_size, bias=False),
            nn.Conv2d(bottleneck, hidden_size, 1),
        )
        positions = layers.sincos_positions(self.grid, hidden_size)
        self.register_buffer("positions", positions, persistent=False)
        self.time_embedding = layers.TimestepEmbedding(layers.NUM_TIME_FEATURES, hidden_size)
        self.label_embedding = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        class_positions = torch.randn(self.num_class_tokens, hidden_size) * INIT_STD
        self.class_positions = nn.Parameter(class_positions) if self.num_class_tokens else None
        parts = dict(norm=RMS_NORM, mlp=layers.SwiGLU if swiglu else layers.MLP, qk_norm=qk_norm)
        middle = range(depth // 4, depth - depth // 4)
        dropouts = [dropout if i in middle else 0.0 for i in range(depth)]
        self.blocks = nn.ModuleList(
            DiTBlock(hidden_size, num_heads, mlp_ratio, rate, **parts) for rate in dropouts
        )
        fixed, head_size = self.num_class_tokens, hidden_size // num_heads
        rotations = layers.rotary_table(self.grid, head_size, fixed) if rope else None
        self.register_buffer("rotations", rotations, persistent=False)
        self.final_norm = RMS_NORM(hidden_size)
        self.final_modulation = nn.Linear(hidden_size, 2 * hidden_size)
        self.out = nn.Linear(hidden_size, patch_size**2 * (out_channels or in_channels))
        init_weights(self)

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        layers.check_image_size(x, self.img_size)
        x = self.patch_embedding(x).flatten(2).transpose(1, 2) + self.positions  # (B, N, D)
        c, class_tokens = self.time_embedding(t), None
        if self.label_embedding is not None:
            label = self.label_embedding(y)
            c = c + label
            if self.class_positions is not None:
                class_tokens = label[:, None] + self.class_positions  # (B, n, D)
        c = F.silu(c)  # (B, D)
        all_rotations = self.rotations  # (2, n + N, D / heads / 2)
        rotations = None if all_rotations is None else all_rotations[:, self.num_class_tokens :]
        for i, block in enumerate(self.blocks):
            if i == self.class_tokens_at and class_tokens is not None:
                x, rotations = torch.cat([class_tokens, x], dim=1), all_rotations
            recompute = self.activation_checkpointing
            x = layers.run_block(block, x, c, rotations, recompute=recompute)
        x = x[:, self.num_class_tokens :]
        shift, scale = self.final_modulation(c).chunk(2, dim=1)
        x = self.out(layers.modulate(self.final_norm(x), shift, scale))  # (B, N, p * p * C)
        return layers.unpatchify(x, self.grid, self.patch_size)
