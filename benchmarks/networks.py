"""Our backbones and those of other packages, all called as (x, t, y), their widths chosen by FLOPs.

diffusers and denoising-diffusion-pytorch are imported when one of theirs is built:
pip install -r benchmarks/requirements.txt
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode, register_flop_formula

from models.dim import DiM
from models.dit import DiT
from models.unet import UNet

SIDE, CHANNELS, NUM_CLASSES = 32, 3, 10
SHAPE = (CHANNELS, SIDE, SIDE)
UNET_MULT, UNET_BLOCKS, UNET_ATTENTION = (1, 2, 2), 2, 16
PATCH_SIZE, DEPTH, HEAD_DIM = 2, 6, 64
UNET_WIDTHS = range(32, 257, 32)  # the attention's channels are twice as many, in heads of 64
LUCIDRAINS_WIDTHS = range(32, 257, 8)
DIT_WIDTHS = range(64, 1025, 64)
RANDOM_STD = 0.02


def our_unet(width: int) -> nn.Module:
    return UNet(
        image_size=(SIDE, SIDE),
        in_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        model_channels=width,
        channel_mult=UNET_MULT,
        num_res_blocks=UNET_BLOCKS,
        attention_resolutions=(UNET_ATTENTION,),
        num_head_channels=HEAD_DIM,
        dropout=0.0,
    )


def our_dit(width: int) -> nn.Module:
    return DiT(
        img_size=(SIDE, SIDE),
        in_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        patch_size=PATCH_SIZE,
        hidden_size=width,
        depth=DEPTH,
        num_heads=width // HEAD_DIM,
    )


def our_dim(width: int, *, mixer: str, pad_tokens: int) -> nn.Module:
    return DiM(
        img_size=(SIDE, SIDE),
        in_channels=CHANNELS,
        num_classes=NUM_CLASSES,
        patch_size=PATCH_SIZE,
        hidden_size=width,
        depth=DEPTH,
        mixer=mixer,
        pad_tokens=pad_tokens,
    )


class DiffusersUNet(nn.Module):
    """UNet2DModel with our levels.

    Args:
        num_groups, head_dim: ours by default; diffusers' own defaults are 32 and 8.
    """

    def __init__(self, width: int, *, num_groups: int | None = None, head_dim: int = HEAD_DIM):
        from diffusers import UNet2DModel

        super().__init__()
        sides = [SIDE // 2**level for level in range(len(UNET_MULT))]
        attends = [side == UNET_ATTENTION for side in sides]
        self.network = UNet2DModel(
            sample_size=SIDE,
            in_channels=CHANNELS,
            out_channels=CHANNELS,
            block_out_channels=[width * mult for mult in UNET_MULT],
            layers_per_block=UNET_BLOCKS,
            down_block_types=["AttnDownBlock2D" if a else "DownBlock2D" for a in attends],
            up_block_types=["AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)],
            norm_num_groups=num_groups or min(32, width // 4),
            attention_head_dim=head_dim,
            num_class_embeds=NUM_CLASSES + 1,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x, t, y + 1, return_dict=False)[0]


class DiffusersDiT(nn.Module):
    def __init__(self, width: int) -> None:
        from diffusers import DiTTransformer2DModel

        super().__init__()
        self.network = DiTTransformer2DModel(
            num_attention_heads=width // HEAD_DIM,
            attention_head_dim=HEAD_DIM,
            in_channels=CHANNELS,
            num_layers=DEPTH,
            sample_size=SIDE,
            patch_size=PATCH_SIZE,
            num_embeds_ada_norm=NUM_CLASSES,
        )

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        labels = y.where(y >= 0, NUM_CLASSES)
        return self.network(x, timestep=t, class_labels=labels, return_dict=False)[0]


class LucidrainsUnet(nn.Module):
    """The Unet of denoising-diffusion-pytorch, which knows no classes."""

    def __init__(self, width: int) -> None:
        from denoising_diffusion_pytorch import Unet

        super().__init__()
        self.network = Unet(width, dim_mults=UNET_MULT, channels=CHANNELS)

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        return self.network(x, t)


class Candidate(NamedTuple):
    """A network to time.

    Attributes:
        family: unet, dit or dim.
        build: width -> network.
        widths: to choose from; empty: that of our DiT.
    """

    name: str
    family: str
    build: Callable[[int], nn.Module]
    widths: Sequence[int]


OUR_UNET, OUR_DIT = "our UNet", "our DiT"
REFERENCES = {"unet": OUR_UNET, "dit": OUR_DIT, "dim": OUR_DIT}  # whom a family is beside

CANDIDATES = (
    Candidate(OUR_UNET, "unet", our_unet, UNET_WIDTHS),
    Candidate("diffusers UNet2D", "unet", DiffusersUNet, UNET_WIDTHS),
    Candidate(
        "diffusers UNet2D, default groups and heads",
        "unet",
        partial(DiffusersUNet, num_groups=32, head_dim=8),
        UNET_WIDTHS,
    ),
    Candidate("denoising-diffusion-pytorch Unet", "unet", LucidrainsUnet, LUCIDRAINS_WIDTHS),
    Candidate(OUR_DIT, "dit", our_dit, DIT_WIDTHS),
    Candidate("diffusers DiT", "dit", DiffusersDiT, DIT_WIDTHS),
    Candidate("our DiM", "dim", partial(our_dim, mixer="mamba1", pad_tokens=3), ()),
    Candidate("our DiM, no padding", "dim", partial(our_dim, mixer="mamba1", pad_tokens=0), ()),
    Candidate("our DiM, mamba2", "dim", partial(our_dim, mixer="mamba2", pad_tokens=3), ()),
)


@register_flop_formula(torch.ops.diffusion_models.selective_scan)
def _scan_flops(u, dt, A, *_args, out_shape=None, **_options) -> int:
    """Of h_t = 2^(dt A) h_(t-1) + dt u B and y = C . h: two products and two multiply-adds."""
    batch, length, _ = u
    return 6 * batch * length * A[0] * A[1]


def draw_inputs(batch_size: int, device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """x (B, C, H, W), t (B,), y (B,)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(batch_size, *SHAPE, generator=generator)
    t = torch.randint(1000, (batch_size,), generator=generator)
    y = torch.randint(NUM_CLASSES, (batch_size,), generator=generator)
    return x.to(device), t.to(device), y.to(device)


def _convolution_flops(
    _x, weight, _bias, _stride, _padding, _dilation, transposed, *_args, out_shape=None, **_options
) -> int:
    """The only transposed convolution is our UNet's upsampling on a CPU, which saves products; it
    counts as what it replaces, a 3x3 convolution of the repeated pixels."""
    products = weight[0] * 9 if transposed else math.prod(weight[1:])
    return 2 * math.prod(out_shape) * products


def count_flops(model: nn.Module) -> int:
    """Of one image's forward pass: 2 per multiply-add."""
    counter = FlopCounterMode(
        display=False, custom_mapping={torch.ops.aten.convolution: _convolution_flops}
    )
    device = next(model.parameters()).device
    inputs = (tensor.to(device) for tensor in draw_inputs(1, torch.device("cpu")))
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), counter:  # fused kernels hide theirs
        model(*inputs)
    return counter.get_total_flops()


def choose_width(candidate: Candidate, flops: float) -> int:
    """The width whose FLOPs are nearest."""
    best, best_distance = 0, float("inf")
    for width in candidate.widths:
        distance = abs(count_flops(candidate.build(width)) - flops)
        if distance > best_distance:
            break
        best, best_distance = width, distance
    return best


def fill_zeros(model: nn.Module) -> None:
    """Small random weights where a fresh network has zeros, as after some steps of training."""
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=RANDOM_STD)


def saved_bytes(model: nn.Module, *inputs: Tensor) -> int:
    """Of the storages that a forward pass keeps for backward; parameters and buffers left out."""
    own = {t.untyped_storage().data_ptr() for t in (*model.parameters(), *model.buffers())}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor  # alive until the end, so that no address is used twice

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        output = model(*inputs)
    assert output.requires_grad
    return sum(kept.values())
