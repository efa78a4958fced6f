"""DiM, Diffusion Mamba (Teng et al. 2024, arXiv 2405.14224): Mamba mixers instead of attention.

Patches become one sequence that every block walks in another direction. A prefix of timestep and
class tokens stays in front. Learned padding tokens at the ends of rows and columns keep what is
far apart in the image apart in the sequence. Blocks i and depth - 1 - i share a direction and are
joined by a long skip. Depthwise 3x3 convolutions at both ends add what a scan sees badly: the
neighbours across it.
"""

from __future__ import annotations

import logging
import math
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from models import layers
from models.layers import LabelEmbedding, at_least_fp32
from models.mamba import MIXERS, TORCH
from models.mamba_backend import INSTALL_HINT, BackendName, choose_backend
from models.scan_paths import Scan, mirrored, moves, scan_paths
from utils.config_types import BelowOne, NonNegativeFloat, NonNegativeInt, PositiveInt

INIT_STD = 0.02  # standard deviation of the learned positions and padding tokens
PAPER_PAD_TOKENS = 3

# Width and depth: the paper's sizes, and smaller ones with names made of these numbers.
_WIDTHS = {"DiM-S": (512, 25), "DiM-L": (1024, 49), "DiM-H": (1536, 49)}
_WIDTHS |= {"384x25": (384, 25), "384x13": (384, 13), "128x5": (128, 5)}
SIZES = {
    f"{name}/2": dict(patch_size=2, hidden_size=width, depth=depth)
    for name, (width, depth) in _WIDTHS.items()
}
DEFAULT = "384x13/2"
STATE_SIZES = {"mamba1": 16, "mamba2": 64}

Conditioning = Literal["adaln_single", "adaln_zero"]
PadTokens = Annotated[NonNegativeInt, Field(le=3)]

log = logging.getLogger("diffusion")


class DiMBlock(nn.Module):
    """Adds the long skip, mixes along the sequence and, if wanted, applies an MLP.

    With `adaln_single` c holds the shifts, scales and gates that all blocks share, to which the
    block adds a table of its own (PixArt); with `adaln_zero` a zero-initialised layer of its own
    derives them from the embedding c (DiT).
    """

    def __init__(
        self,
        dim: int,
        mixer: nn.Module,
        *,
        mlp_dim: int,
        dropout: float,
        conditioning: Conditioning,
        has_skip: bool,
    ) -> None:
        super().__init__()
        # the two halves of one layer on the concatenation (stream, skip)
        self.stream = nn.Linear(dim, dim) if has_skip else None
        self.skip = nn.Linear(dim, dim, bias=False) if has_skip else None
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.mixer = mixer
        self.norm2 = nn.RMSNorm(dim, eps=1e-5) if mlp_dim else None
        self.mlp = layers.MLP(dim, mlp_dim, dropout) if mlp_dim else None
        rows = 6 if mlp_dim else 3
        if conditioning == "adaln_zero":
            self.modulation, self.table = layers.zero_init(nn.Linear(dim, rows * dim)), None
        else:
            table = torch.randn(rows * dim) / math.sqrt(dim)
            self.modulation, self.table = None, nn.Parameter(table)
        self.gate_offset = 1.0 if self.modulation is None else 0.0  # starts open, or closed

    def forward(self, x: Tensor, c: Tensor, skip: Tensor | None = None) -> Tensor:
        if self.skip is not None:
            x = at_least_fp32(self.stream(x) + self.skip(skip))  # the stream stays wide
        rows = c + self.table if self.modulation is None else self.modulation(c)
        shift, scale, gate, *of_mlp = rows.unflatten(1, (-1, x.shape[2])).unbind(1)  # (B, D) each
        gate = (self.gate_offset + gate)[:, None]
        x = torch.addcmul(x, gate, self.mixer(layers.modulate(self.norm1(x), shift, scale)))
        if self.mlp is not None:
            shift, scale, gate = of_mlp
            gate = (self.gate_offset + gate)[:, None]
            x = torch.addcmul(x, gate, self.mlp(layers.modulate(self.norm2(x), shift, scale)))
        return x


class DiM(nn.Module):
    """A network (x_t, t, y) -> (B, out_channels, H, W). Sizes that do not fit are a ValueError.

    Args:
        img_size: (H, W) in pixels, divisible by patch_size.
        in_channels: channels of the image.
        num_classes: K; with 0 the network is unconditional.
        out_channels: default: in_channels.
        size: `DiM-S/2`, `DiM-L/2`, `DiM-H/2` of the paper, or `128x5/2`, `384x13/2`, `384x25/2`:
            sets the three arguments after it.
        patch_size, hidden_size, depth: default: those of 384x13/2. The paper's depths are odd.
        state_size: N of the mixer; default: 16 for mamba1, 64 for mamba2.
        d_conv, expand: taps of the mixer's convolution, inner width over hidden_size.
        mlp_ratio: hidden width of an MLP after every mixer over hidden_size; 0, as in the paper:
            no MLP.
        dropout: probability within the MLPs.
        mixer: `mamba1` or `mamba2`; other parameters, another function.
        scan: `cross4` (the paper's), `row`, `row_bidir` or `zigzag8`, see models/scan_paths.py.
        pad_tokens: learned tokens at the end of every row and column, 0 to 3; default: 3 (the
            paper's), 0 for `row` and `zigzag8`.
        conditioning: `adaln_single` (the paper's) or `adaln_zero` (as DiT).
        mamba_backend: `auto`, `torch`, `triton` or `mamba_ssm`; who computes, not what.
        activation_checkpointing: recompute blocks in backward: less memory for one more forward.
    """

    needs_bf16_range = True  # the recurrence exceeds what fp16 can hold
    computing_params = ("mamba_backend", "activation_checkpointing")  # how it is computed, not what

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
        state_size: PositiveInt | None = None,
        d_conv: PositiveInt = 3,
        expand: PositiveInt = 2,
        mlp_ratio: NonNegativeFloat = 0.0,
        dropout: BelowOne = 0.0,
        mixer: Literal["mamba1", "mamba2"] = "mamba1",
        scan: Scan = "cross4",
        pad_tokens: PadTokens | None = None,
        conditioning: Conditioning = "adaln_single",
        mamba_backend: BackendName = "auto",
        activation_checkpointing: bool = False,
    ) -> None:
        super().__init__()
        args = dict(patch_size=patch_size, hidden_size=hidden_size, depth=depth)
        patch_size, hidden_size, depth = layers.from_size(size, SIZES, DEFAULT, args)
        mlp_dim = layers.mlp_width(hidden_size, mlp_ratio)
        if dropout and not mlp_dim:
            raise ValueError(f"dropout={dropout} works within MLPs, and mlp_ratio=0 has none")
        if pad_tokens is None:
            pad_tokens = 0 if scan in ("row", "zigzag8") else PAPER_PAD_TOKENS
        if pad_tokens and scan == "zigzag8":
            raise ValueError("scan='zigzag8' leaves no row or column to pad: use pad_tokens=0")
        self.img_size, self.patch_size = tuple(img_size), patch_size
        self.grid = layers.patch_grid(self.img_size, patch_size)
        self.num_skips = (depth - 1) // 2
        self.mixer_name, self.mamba_backend, self.backend = mixer, mamba_backend, TORCH
        self.state_size = state_size or STATE_SIZES[mixer]
        self.activation_checkpointing = activation_checkpointing

        self.patch_embedding = nn.Conv2d(in_channels, hidden_size, patch_size, stride=patch_size)
        self.first_conv = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.time_embedding = layers.TimestepEmbedding(layers.NUM_TIME_FEATURES, hidden_size)
        self.label_embedding = LabelEmbedding(num_classes, hidden_size) if num_classes else None
        num_conditions = 2 if num_classes else 1
        num_positions = num_conditions + math.prod(self.grid)
        self.positions = nn.Parameter(torch.randn(num_positions, hidden_size) * INIT_STD)
        pads = torch.randn(pad_tokens, hidden_size) * INIT_STD
        self.pads = nn.Parameter(pads) if pad_tokens else None

        shared = conditioning == "adaln_single"
        width = (6 if mlp_dim else 3) * hidden_size
        self.modulation = nn.Linear(hidden_size, width) if shared else None
        self.blocks = nn.ModuleList(
            DiMBlock(
                hidden_size,
                MIXERS[mixer](hidden_size, d_state=self.state_size, d_conv=d_conv, expand=expand),
                mlp_dim=mlp_dim,
                dropout=dropout,
                conditioning=conditioning,
                has_skip=i >= depth - self.num_skips,
            )
            for i in range(depth)
        )
        self.last_conv = nn.Conv2d(hidden_size, hidden_size, 3, padding=1, groups=hidden_size)
        self.final_norm = nn.RMSNorm(hidden_size, eps=1e-5)
        self.final_modulation = None if shared else nn.Linear(hidden_size, 2 * hidden_size)
        table = torch.randn(2 * hidden_size) / math.sqrt(hidden_size) if shared else None
        self.final_table = nn.Parameter(table) if shared else None
        self.out = nn.Linear(hidden_size, patch_size**2 * (out_channels or in_channels))
        layers.init_weights(self)
        with torch.no_grad():
            for block in self.blocks:
                block.mixer.out_proj.weight.div_(math.sqrt(depth))

        # the prefix (conditions, then one row of padding tokens) stays where it is
        self.num_prefix = num_conditions + pad_tokens
        self.padded_grid = (self.grid[0] + pad_tokens, self.grid[1] + pad_tokens)
        self._init_paths(scan, depth)

    def _init_paths(self, scan: Scan, depth: int) -> None:
        """Tabulate how tokens move between the orders in which the blocks walk them."""
        cycle = scan_paths(scan, self.padded_grid)
        steps = moves([cycle[i] for i in mirrored(depth, len(cycle))])
        natural = torch.arange(len(steps[0]), device="cpu")
        self.moves_tokens = tuple(not torch.equal(step, natural) for step in steps)
        prefix = torch.arange(self.num_prefix, device="cpu")
        permutations = torch.stack([torch.cat([prefix, self.num_prefix + step]) for step in steps])
        self.register_buffer("permutations", permutations, persistent=False)  # (depth + 1, L)

    def choose_backend(self, device: torch.device) -> None:
        """Decide, and log in one line, who computes the recurrence on `device`; see the function
        of the same name for what it raises."""
        mixer = self.mixer_name
        backend = choose_backend(self.mamba_backend, mixer, device, d_state=self.state_size)
        self.backend = backend
        for block in self.blocks:
            block.mixer.backend = backend
        level = logging.WARNING if backend.slow else logging.INFO
        advice = f"; same function, slower; {INSTALL_HINT}" if backend.slow else ""
        log.log(level, f"DiM:    mixer={mixer} backend={backend.name} ({backend.reason}){advice}")

    def no_weight_decay(self) -> set[str]:
        """Names of parameters that a pull towards zero would give another meaning."""
        endings = (".A_log", ".D", ".dt_bias", ".dt_proj.bias", "pads")
        return {name for name, _ in self.named_parameters() if name.endswith(endings)}

    def forward(self, x: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        layers.check_image_size(x, self.img_size)
        embedding = self.time_embedding(t)  # (B, D)
        conditions = [embedding]
        if self.label_embedding is not None:
            conditions.append(self.label_embedding(y))
            embedding = embedding + conditions[1]
        embedding = F.silu(embedding)
        c = embedding if self.modulation is None else self.modulation(embedding)

        x = self._tokens(x, torch.stack(conditions, dim=1))  # (B, L, D), row by row
        skips = []
        first_decoder = len(self.blocks) - self.num_skips
        for i, block in enumerate(self.blocks):
            x = self._move(x, i)
            skip = skips.pop() if i >= first_decoder else None
            x = layers.run_block(block, x, c, skip, recompute=self.activation_checkpointing)
            if i < self.num_skips:
                skips.append(x)
        x = self._move(x, len(self.blocks))

        h, w = self.grid
        x = x[:, self.num_prefix :].unflatten(1, self.padded_grid)[:, :h, :w]  # (B, h, w, D)
        x = self.last_conv(x.permute(0, 3, 1, 2)).flatten(2).transpose(1, 2)
        if self.final_table is None:
            rows = self.final_modulation(embedding)
        else:
            rows = c[:, : len(self.final_table)] + self.final_table
        shift, scale = rows.chunk(2, dim=1)
        x = self.final_norm(at_least_fp32(x))
        x = self.out(layers.modulate(x, shift, scale))  # (B, h * w, p * p * C)
        return layers.unpatchify(x, self.grid, self.patch_size)

    def _tokens(self, x: Tensor, conditions: Tensor) -> Tensor:
        """The padded sequence, row by row, of images (B, C, H, W) and conditions (B, n, D)."""
        x = self.first_conv(self.patch_embedding(x)).flatten(2).transpose(1, 2)
        num_conditions = conditions.shape[1]
        prefix = conditions + self.positions[:num_conditions]
        x = x + self.positions[num_conditions:]  # (B, h * w, D)
        if self.pads is None:
            return torch.cat([prefix, x], dim=1)
        (h, w), pads = self.grid, self.pads.expand(x.shape[0], 1, -1, -1)  # (B, 1, p, D)
        x = torch.cat([x.unflatten(1, (h, w)), pads.expand(-1, h, -1, -1)], dim=2)
        below = pads.transpose(1, 2).expand(-1, -1, self.padded_grid[1], -1)
        grid = torch.cat([x, below], dim=1).flatten(1, 2)
        return torch.cat([prefix, pads[:, 0], grid], dim=1)

    def _move(self, x: Tensor, step: int) -> Tensor:
        """Bring tokens from the order of block `step - 1` into that of block `step`."""
        return x.index_select(1, self.permutations[step]) if self.moves_tokens[step] else x
