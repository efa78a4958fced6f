"""The UNet of DDPM (Ho et al. 2020), with class conditioning."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import LabelEmbedding, TimestepEmbedding, run_block, zero_init
from utils.config_types import BelowOne, PositiveInt

MAX_GROUPS = 32
MIN_CHANNELS_PER_GROUP = 4
LARGEST_ATTENTION_SIDE = 16  # default: attend at levels whose shorter side is at most this

Norm = Callable[[int], nn.GroupNorm]


def group_norm(channels: int, num_groups: int | None = None) -> nn.GroupNorm:
    """A group norm of `num_groups` groups, which must divide the channels, else a ValueError is
    raised; by default the largest fitting number of at most 32 with at least 4 channels each."""
    if num_groups is None:
        num_groups = min(MAX_GROUPS, max(1, channels // MIN_CHANNELS_PER_GROUP))
        while channels % num_groups:
            num_groups -= 1
    if channels % num_groups:
        raise ValueError(f"norm_groups={num_groups} does not divide a level's {channels} channels")
    return nn.GroupNorm(num_groups, channels)


class ResBlock(nn.Module):
    """Two 3x3 convolutions around the conditioning embedding, plus a shortcut."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        emb_dim: int,
        *,
        dropout: float,
        scale_shift: bool,
        norm: Norm,
    ) -> None:
        super().__init__()
        self.scale_shift = scale_shift
        self.norm1 = norm(in_channels)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.emb = nn.Linear(emb_dim, out_channels * (2 if scale_shift else 1))
        self.norm2 = norm(out_channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = zero_init(nn.Conv2d(out_channels, out_channels, 3, padding=1))
        same = in_channels == out_channels
        self.shortcut = nn.Identity() if same else nn.Conv2d(in_channels, out_channels, 1)

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        modulation = self.emb(emb)[:, :, None, None]
        if self.scale_shift:
            scale, shift = modulation.chunk(2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + modulation)
        return self.shortcut(x) + self.conv2(self.dropout(F.silu(h)))


class AttentionBlock(nn.Module):
    """Self-attention over all pixels, plus a shortcut."""

    def __init__(self, channels: int, num_head_channels: int, norm: Norm = group_norm) -> None:
        super().__init__()
        self.num_heads = max(1, channels // num_head_channels)
        if channels % self.num_heads:
            message = f"num_head_channels={num_head_channels} does not divide a level's"
            raise ValueError(f"{message} {channels} channels")
        self.norm = norm(channels)
        self.qkv = nn.Conv2d(channels, 3 * channels, 1)
        self.proj = zero_init(nn.Conv2d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        b, c, h, w = x.shape
        qkv = self.qkv(self.norm(x)).reshape(b, 3, self.num_heads, c // self.num_heads, h * w)
        # contiguous: fused attention kernels refuse channels that lie h * w apart
        q, k, v = qkv.transpose(-1, -2).contiguous().unbind(1)  # (B, heads, N, c / heads)
        out = F.scaled_dot_product_attention(q, k, v)
        return x + self.proj(out.transpose(-1, -2).reshape(b, c, h, w))


class Downsample(nn.Module):
    """Halve height and width by a strided convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class Upsample(nn.Module):
    """Double height and width by repetition and a convolution."""

    reads_weights = ("conv",)  # `forward` takes its weight, so no adapter may replace it

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        if x.device.type != "cpu":
            return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
        # Both at once: a transposed convolution whose 4x4 kernel sums four shifts of the 3x3 one,
        # 4/9 of the multiplications. (A training step gains 5 % of its time; elsewhere unknown.)
        weight = F.pad(self.conv.weight.transpose(0, 1).flip(2, 3), (1, 1, 1, 1))
        weight = weight[..., 1:] + weight[..., :-1]
        weight = weight[..., 1:, :] + weight[..., :-1, :]
        return F.conv_transpose2d(x, weight, self.conv.bias, stride=2, padding=1)


class Stage(nn.Module):
    """A residual block on the input and the skip to it, with attention after it where wanted."""

    def __init__(self, block: ResBlock, attention: AttentionBlock | nn.Identity) -> None:
        super().__init__()
        self.block, self.attention = block, attention

    def forward(self, x: Tensor, emb: Tensor, skip: Tensor | None = None) -> Tensor:
        x = x if skip is None else torch.cat([x, skip], dim=1)
        return self.attention(self.block(x, emb))


class UNet(nn.Module):
    """A network (x_t, t, y) -> (B, out_channels, H, W). Sizes that do not fit are a ValueError.

    Args:
        image_size: (H, W) in pixels, divisible by 2 ** (levels - 1).
        in_channels: channels of the image.
        num_classes: K; with 0 the network is unconditional.
        model_channels: width of the first level; level i has model_channels * channel_mult[i].
        out_channels: default: in_channels.
        num_res_blocks: residual blocks per level (one more on the way up).
        attention_resolutions: shorter sides, in pixels, of the levels with attention; default:
            those of at most 16.
        use_attention: False removes all attention, that of the bottleneck too.
        num_head_channels: channels of one attention head.
        norm_groups: groups of every group norm; default: at most 32, of 4 channels or more.
        dropout: probability within residual blocks.
        use_scale_shift_norm: condition by scale and shift (ADM) instead of by addition (DDPM).
        class_conditioning: `embedding` adds the class to the timestep embedding; `concat`
            broadcasts an embedding of `class_emb_size` as extra input channels.
        activation_checkpointing: recompute stages in backward: less memory for one more forward.
    """

    computing_params = ("activation_checkpointing",)  # they say how it is computed, not what

    def __init__(
        self,
        *,
        image_size: tuple[int, int],
        in_channels: int,
        num_classes: int = 0,
        model_channels: PositiveInt = 128,
        out_channels: int | None = None,
        num_res_blocks: PositiveInt = 2,
        channel_mult: tuple[PositiveInt, ...] = (1, 2, 2, 2),
        attention_resolutions: tuple[PositiveInt, ...] | None = None,
        use_attention: bool = True,
        num_head_channels: PositiveInt = 64,
        norm_groups: PositiveInt | None = None,
        dropout: BelowOne = 0.1,
        use_scale_shift_norm: bool = False,
        class_conditioning: Literal["embedding", "concat"] = "embedding",
        class_emb_size: PositiveInt = 16,
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        self.activation_checkpointing = activation_checkpointing
        widths = [model_channels * mult for mult in channel_mult]
        levels = _levels(image_size, widths, attention_resolutions if use_attention else ())
        if model_channels % 2:
            raise ValueError(f"model_channels={model_channels} must be even")

        emb_dim = 4 * model_channels
        self.time_embedding = TimestepEmbedding(model_channels, emb_dim)
        concat = num_classes > 0 and class_conditioning == "concat"
        add = num_classes > 0 and not concat
        self.class_planes = LabelEmbedding(num_classes, class_emb_size) if concat else None
        self.label_embedding = LabelEmbedding(num_classes, emb_dim) if add else None

        norm = partial(group_norm, num_groups=norm_groups)
        residual = partial(
            ResBlock, emb_dim=emb_dim, dropout=dropout, scale_shift=use_scale_shift_norm, norm=norm
        )
        attention = partial(AttentionBlock, num_head_channels=num_head_channels, norm=norm)

        def stage(channels_in: int, channels_out: int, attends: bool) -> Stage:
            block = residual(channels_in, channels_out)
            return Stage(block, attention(channels_out) if attends else nn.Identity())

        channels = widths[0]
        first_channels = in_channels + (class_emb_size if concat else 0)
        self.stem = nn.Conv2d(first_channels, channels, 3, padding=1)
        self.down = nn.ModuleList()
        skips = [channels]
        for number, (width, attends) in enumerate(levels):
            for _ in range(num_res_blocks):
                self.down.append(stage(channels, width, attends))
                channels = width
                skips.append(channels)
            if number < len(levels) - 1:
                self.down.append(Downsample(channels))
                skips.append(channels)

        first = stage(channels, channels, use_attention)
        self.middle = nn.ModuleList([first, stage(channels, channels, False)])

        self.up = nn.ModuleList()
        for number, (width, attends) in reversed(list(enumerate(levels))):
            for _ in range(num_res_blocks + 1):
                self.up.append(stage(channels + skips.pop(), width, attends))
                channels = width
            if number > 0:
                self.up.append(Upsample(channels))

        self.side_factor = 2 ** (len(levels) - 1)
        self.out_norm = norm(channels)
        self.out = zero_init(nn.Conv2d(channels, out_channels or in_channels, 3, padding=1))

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        height, width = x.shape[2:]
        if height % self.side_factor or width % self.side_factor:
            needed = f"this model needs sides divisible by {self.side_factor}"
            raise ValueError(f"{needed}, got {height}x{width}")
        emb = self.time_embedding(t)  # (B, D)
        if self.label_embedding is not None:
            emb = emb + self.label_embedding(y)
        emb = F.silu(emb)
        if self.class_planes is not None:
            planes = self.class_planes(y)[:, :, None, None].expand(-1, -1, *x.shape[2:])
            x = torch.cat([x, planes.to(x.dtype)], dim=1)

        run_stage = partial(run_block, recompute=self.activation_checkpointing)
        h = self.stem(x)
        skips = [h]
        for layer in self.down:
            h = run_stage(layer, h, emb) if isinstance(layer, Stage) else layer(h)
            skips.append(h)
        for layer in self.middle:
            h = run_stage(layer, h, emb)
        for layer in self.up:
            h = run_stage(layer, h, emb, skips.pop()) if isinstance(layer, Stage) else layer(h)
        return self.out(F.silu(self.out_norm(h)))


def _levels(
    image_size: tuple[int, int], widths: list[int], resolutions: tuple[int, ...] | None
) -> list[tuple[int, bool]]:
    """The channels of each level, from the largest image to the smallest, and whether it attends:
    if its shorter side is one of `resolutions`, or, where they are None, at most 16. Raises a
    ValueError if the image cannot be halved so often, or a resolution is that of no level."""
    if not widths:
        raise ValueError("channel_mult=() has no levels")
    factor = 2 ** (len(widths) - 1)
    if any(side % factor for side in image_size):
        message = f"image_size {image_size} cannot be halved {len(widths) - 1} times"
        advice = f"use multiples of {factor}, or less than {len(widths)} levels in channel_mult"
        raise ValueError(f"{message}; {advice}")
    sides = [min(image_size) // 2**number for number in range(len(widths))]
    if resolutions is None:
        resolutions = tuple(side for side in sides if side <= LARGEST_ATTENTION_SIDE)
    if unmatched := [side for side in resolutions if side not in sides]:
        message = f"attention_resolutions {unmatched} match no level; image_size {image_size} has"
        raise ValueError(f"{message} levels with the sides {', '.join(map(str, sides))}")
    return [(width, side in resolutions) for width, side in zip(widths, sides, strict=True)]
