"""Our UNet as the UNet2DModel of diffusers: the same network under other names, or a clear no."""

from __future__ import annotations

from typing import Any

from torch import nn

from models.unet import AttentionBlock, Downsample, Stage, UNet
from utils.config import Config
from utils.errors import ConfigError
from utils.images import ImageSpec

# Module of ours -> that of theirs, or the several that ours joins along the first dimension.
_OUTER = {
    "time_embedding.mlp.0": ("time_embedding.linear_1",),
    "time_embedding.mlp.2": ("time_embedding.linear_2",),
    "label_embedding.table": ("class_embedding",),
    "stem": ("conv_in",),
    "out_norm": ("conv_norm_out",),
    "out": ("conv_out",),
}
_RESNET = {
    "norm1": ("norm1",),
    "conv1": ("conv1",),
    "emb": ("time_emb_proj",),
    "norm2": ("norm2",),
    "conv2": ("conv2",),
    "shortcut": ("conv_shortcut",),
}
_ATTENTION = {"norm": ("group_norm",), "qkv": ("to_q", "to_k", "to_v"), "proj": ("to_out.0",)}
_REASONS = {
    "dit": "diffusers' DiTTransformer2DModel has timestep features of other frequencies",
    "dim": "diffusers has no Mamba backbone",
}


def unet2d_config(model: nn.Module, config: Config, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of the UNet2DModel that computes what `model` does, read off its modules.

    Its class labels are ours plus one: row 0 of the embedding is the null label's.

    Raises:
        ConfigError: there is none. Names the setting that prevents it.
    """
    if not isinstance(model, UNet):
        reason = _REASONS.get(config.model_type, "diffusers has no such backbone")
        raise _no_counterpart(f"model_type={config.model_type!r}", reason)
    if model.class_planes is not None:
        reason = "UNet2DModel takes no class as input channels"
        raise _no_counterpart("model_params.class_conditioning='concat'", reason)
    levels = _levels(model)
    widths = [level[-1].block.conv1.out_channels for level in levels]
    if model.time_embedding.num_features != widths[0]:
        reason = "UNet2DModel has as many timestep features as first-level channels; begin with 1"
        raise _no_counterpart("model_params.channel_mult", reason)
    attends = [isinstance(level[0].attention, AttentionBlock) for level in levels]
    groups = _num_groups(model, widths)
    return dict(
        sample_size=(spec.height, spec.width),
        in_channels=spec.channels,
        out_channels=spec.channels,
        block_out_channels=tuple(widths),
        time_embedding_dim=model.time_embedding.mlp[2].out_features,
        flip_sin_to_cos=True,  # cosines first
        freq_shift=0,
        layers_per_block=len(levels[0]),
        down_block_types=tuple("AttnDownBlock2D" if a else "DownBlock2D" for a in attends),
        up_block_types=tuple("AttnUpBlock2D" if a else "UpBlock2D" for a in reversed(attends)),
        add_attention=isinstance(model.middle[0].attention, AttentionBlock),
        attention_head_dim=_head_dim(model),
        norm_num_groups=groups,
        attn_norm_num_groups=groups,
        resnet_time_scale_shift="scale_shift" if model.middle[0].block.scale_shift else "default",
        dropout=model.middle[0].block.dropout.p,
        num_class_embeds=model.label_embedding and model.label_embedding.table.num_embeddings,
    )


def to_unet2d(model: UNet, arguments: dict[str, Any]) -> nn.Module:
    """The UNet2DModel of `unet2d_config`'s arguments with the weights of `model`, in eval mode."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**arguments)
    shapes = {name: tensor.shape for name, tensor in theirs.state_dict().items()}
    names = module_names(len(arguments["block_out_channels"]), arguments["layers_per_block"])
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, parameter = key.rpartition(".")
        parts = tensor.chunk(len(names[module]))
        for name, part in zip(names[module], parts, strict=True):
            full_name = f"{name}.{parameter}"
            state[full_name] = part.reshape(shapes[full_name])  # 1x1 convolutions become matrices
    theirs.load_state_dict(state)
    return theirs.eval().requires_grad_(False)


def module_names(num_levels: int, num_res_blocks: int) -> dict[str, tuple[str, ...]]:
    """Every module of a UNet that may hold parameters -> those of UNet2DModel."""
    names = dict(_OUTER)

    def add_stage(ours: str, theirs: str, number: int) -> None:
        parts = {"block.": ("resnets", _RESNET), "attention.": ("attentions", _ATTENTION)}
        for part, (list_name, inner) in parts.items():
            prefix = f"{theirs}.{list_name}.{number}."
            names.update({ours + part + n: tuple(prefix + o for o in inner[n]) for n in inner})

    for number in range(2):
        add_stage(f"middle.{number}.", "mid_block", number)
    for way, num_stages in (("down", num_res_blocks), ("up", num_res_blocks + 1)):
        for level in range(num_levels):
            first, theirs = level * (num_stages + 1), f"{way}_blocks.{level}"
            for number in range(num_stages):
                add_stage(f"{way}.{first + number}.", theirs, number)
            names[f"{way}.{first + num_stages}.conv"] = (f"{theirs}.{way}samplers.0.conv",)
    return names


def _levels(model: UNet) -> list[list[Stage]]:
    """The stages of each level on the way down."""
    levels: list[list[Stage]] = [[]]
    for layer in model.down:
        if isinstance(layer, Downsample):
            levels.append([])
        else:
            levels[-1].append(layer)
    return levels


def _num_groups(model: UNet, widths: list[int]) -> int:
    """The number of groups that all norms of the network have."""
    groups = sorted({m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)})
    if len(groups) > 1:
        setting = f"model_params.model_channels, channel_mult: levels of {_listed(widths)} channels"
        reason = f"their norms have {_listed(groups)} groups, UNet2DModel has one number; "
        reason += "models trained with model_params.norm_groups=8 have it, too"
        raise _no_counterpart(setting, reason)
    return groups[0]


def _head_dim(model: UNet) -> int | None:
    """The channels that all attention heads have; None if each level has a single head."""
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    if all(block.num_heads == 1 for block in blocks):
        return None
    channels = sorted({block.qkv.in_channels // block.num_heads for block in blocks})
    if len(channels) > 1:
        reason = f"the heads have {_listed(channels)} channels, UNet2DModel has one number"
        raise _no_counterpart("model_params.num_head_channels", reason)
    return channels[0]


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))


def _no_counterpart(setting: str, reason: str) -> ConfigError:
    return ConfigError(f"{setting}: {reason}. Use --format safetensors")
