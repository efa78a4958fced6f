"""The mixers of Mamba and Mamba-2: token sequences (B, L, D) -> (B, L, D), each token seeing only
those before it.

The modules own their parameters, under the names and shapes of `mamba_ssm.Mamba` and `Mamba2`. Who
computes the recurrence, PyTorch or a CUDA kernel, is chosen in `models.mamba_backend`; it changes
neither the function nor the checkpoint.

Letters: D model width, E = expand * D inner width, N state size, H heads, P channels of a head.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import at_least_fp32
from models.selective_scan import chunked_scan, selective_scan

DT_RANGE = (1e-3, 1e-1)  # step sizes at initialisation, drawn log-uniformly
A_RANGE = (1.0, 16.0)  # Mamba-2: -A at initialisation, drawn uniformly
NUM_GROUPS = 1  # Mamba-2: heads that share B and C
KERNEL_DEVICES = ("cuda",)


@dataclass(frozen=True)
class Backend:
    """Who computes the recurrence, and why."""

    name: str  # `torch`, `triton` with its version, or `mamba_ssm` with version and function
    reason: str = ""  # why this one
    kernel: Callable[..., Tensor] | None = None  # in the place of PyTorch's function
    slow: bool = False  # the device could use kernels and does not

    def runs_on(self, x: Tensor) -> bool:
        """Whether the kernel, and not PyTorch, computes on the device of x."""
        return self.kernel is not None and x.device.type in KERNEL_DEVICES


TORCH = Backend("torch")


class Mamba(nn.Module):
    """Mamba's mixer (Gu and Dao 2023): a decay for every channel and state."""

    reads_weights = ("dt_proj",)  # `forward` takes its weight, so no adapter may replace it

    def __init__(
        self, d_model: int, *, d_state: int = 16, d_conv: int = 3, expand: int = 2
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        self.d_state, self.dt_rank = d_state, math.ceil(d_model / 16)
        self.in_proj = nn.Linear(d_model, 2 * d_inner, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, d_conv, groups=d_inner)
        self.x_proj = nn.Linear(d_inner, self.dt_rank + 2 * d_state, bias=False)
        self.dt_proj = nn.Linear(self.dt_rank, d_inner)
        self.A_log = nn.Parameter(torch.arange(1.0, d_state + 1).log().repeat(d_inner, 1))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.backend: Backend = TORCH
        nn.init.uniform_(self.dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
        with torch.no_grad():
            self.dt_proj.bias.copy_(_initial_dt_bias(d_inner))

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.in_proj(x).chunk(2, dim=-1)  # (B, L, E) each
        u = F.silu(causal_conv(u, self.conv1d))
        sizes = (self.dt_rank, self.d_state, self.d_state)
        dt, B, C = self.x_proj(u).split(sizes, dim=-1)
        dt = F.linear(dt, self.dt_proj.weight)
        A = -torch.exp(at_least_fp32(self.A_log))
        bias = at_least_fp32(self.dt_proj.bias)  # added after the product, which may be in bf16
        scan = self.backend.kernel if self.backend.runs_on(x) else gated_scan
        return self.out_proj(scan(u, dt, A, B, C, at_least_fp32(self.D), z, bias))


class Mamba2(nn.Module):
    """Mamba-2's mixer (Dao and Gu 2024): one decay per head, gated RMSNorm before the output.

    The constructor raises a ValueError for a width that is no whole number of heads.
    """

    def __init__(
        self,
        d_model: int,
        *,
        d_state: int = 64,
        d_conv: int = 3,
        expand: int = 2,
        headdim: int = 64,
    ) -> None:
        super().__init__()
        d_inner = expand * d_model
        if d_inner % headdim:
            raise ValueError(
                f"mixer='mamba2' needs expand * hidden_size divisible by {headdim}, the channels "
                f"of a head, not {expand} * {d_model}"
            )
        self.d_inner, self.d_state, self.num_heads = d_inner, d_state, d_inner // headdim
        conv_dim = d_inner + 2 * NUM_GROUPS * d_state
        self.in_proj = nn.Linear(d_model, d_inner + conv_dim + self.num_heads, bias=False)
        self.conv1d = nn.Conv1d(conv_dim, conv_dim, d_conv, groups=conv_dim)
        self.dt_bias = nn.Parameter(_initial_dt_bias(self.num_heads))
        self.A_log = nn.Parameter(torch.empty(self.num_heads).uniform_(*A_RANGE).log())
        self.D = nn.Parameter(torch.ones(self.num_heads))
        self.norm = nn.RMSNorm(d_inner, eps=1e-5)
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)
        self.backend: Backend = TORCH

    def forward(self, x: Tensor) -> Tensor:
        sizes = (self.d_inner, self.conv1d.in_channels, self.num_heads)
        z, mixed, dt = self.in_proj(x).split(sizes, dim=-1)
        mixed = F.silu(causal_conv(mixed, self.conv1d))
        states = NUM_GROUPS * self.d_state
        u, B, C = mixed.split((self.d_inner, states, states), dim=-1)
        u = u.unflatten(-1, (self.num_heads, -1))  # (B, L, H, P)
        B, C = (tensor.unflatten(-1, (NUM_GROUPS, -1)) for tensor in (B, C))
        A = -torch.exp(at_least_fp32(self.A_log))
        bias = at_least_fp32(self.dt_bias)
        scan = self.backend.kernel if self.backend.runs_on(x) else heads_scan
        y = scan(u, dt, A, B, C, at_least_fp32(self.D), bias).flatten(2)
        return self.out_proj(self.norm(at_least_fp32(y * F.silu(z))))


MIXERS: dict[str, type[nn.Module]] = {"mamba1": Mamba, "mamba2": Mamba2}


def gated_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, z: Tensor, bias: Tensor
) -> Tensor:
    """What a kernel for Mamba-1 computes: `selective_scan` of softplus(dt + bias) by silu(z)."""
    return selective_scan(u, F.softplus(at_least_fp32(dt) + bias), A, B, C, D) * F.silu(z)


def heads_scan(
    u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, bias: Tensor
) -> Tensor:
    """What a kernel for Mamba-2 computes: `chunked_scan` of softplus(dt + bias)."""
    return chunked_scan(u, F.softplus(at_least_fp32(dt) + bias), A, B, C, D)


def causal_conv(x: Tensor, conv: nn.Conv1d) -> Tensor:
    """`conv`'s depthwise convolution of (B, L, E) over this and earlier tokens.

    As products with shifted copies: for so few taps up to twice as fast on a CPU as the
    convolution operator, and without moving L to the end and back.
    """
    taps = conv.weight[:, 0].t()  # (k, E); the last tap is this token's
    padded = F.pad(x, (0, 0, len(taps) - 1, 0))
    y = conv.bias
    for shift, tap in enumerate(taps.unbind()):
        y = torch.addcmul(y, padded[:, shift : shift + x.shape[1]], tap)
    return y


def _initial_dt_bias(size: int) -> Tensor:
    """The inverse softplus (size,) of step sizes that are drawn log-uniformly from DT_RANGE."""
    low, high = map(math.log, DT_RANGE)
    dt = torch.empty(size).uniform_(low, high).exp()
    return dt + torch.log(-torch.expm1(-dt))
