"""Our UNet as the UNet2DModel of diffusers: the same network under other names, or an error."""

from __future__ import annotations

import itertools
from typing import Any

from torch import nn

from models.unet import AttentionBlock, Downsample, UNet
from utils.config import Config
from utils.errors import ConfigError
from utils.images import ImageSpec

# Module of ours -> that of theirs, or the several that ours joins along the first dimension.
_OUTER = {
    "time_embedding.mlp.0": ["time_embedding.linear_1"],
    "time_embedding.mlp.2": ["time_embedding.linear_2"],
    "label_embedding.table": ["class_embedding"],
    "stem": ["conv_in"],
    "out_norm": ["conv_norm_out"],
    "out": ["conv_out"],
}
_STAGE = {  # the stage's number among those of its level belongs into the braces
    "block.norm1": ["resnets.{}.norm1"],
    "block.conv1": ["resnets.{}.conv1"],
    "block.emb": ["resnets.{}.time_emb_proj"],
    "block.norm2": ["resnets.{}.norm2"],
    "block.conv2": ["resnets.{}.conv2"],
    "block.shortcut": ["resnets.{}.conv_shortcut"],
    "attention.norm": ["attentions.{}.group_norm"],
    "attention.qkv": ["attentions.{}.to_q", "attentions.{}.to_k", "attentions.{}.to_v"],
    "attention.proj": ["attentions.{}.to_out.0"],
}
_REASONS = {
    "dit": "diffusers' DiTTransformer2DModel has timestep features of other frequencies",
    "dim": "diffusers has no Mamba backbone",
}
_INSTEAD = "Use --format safetensors"


def unet2d_config(model: nn.Module, config: Config, spec: ImageSpec) -> dict[str, Any]:
    """Arguments of the UNet2DModel that computes what `model` does, read off its modules.

    Its class labels are ours plus one: row 0 of the embedding is the null label's. Raises a
    ConfigError that names the setting if one prevents such a network.
    """
    if not isinstance(model, UNet):
        reason = _REASONS.get(config.model_type, "diffusers has no such backbone")
        raise ConfigError(f"model_type={config.model_type!r}: {reason}. {_INSTEAD}")
    if model.class_planes is not None:
        setting = "model_params.class_conditioning='concat'"
        raise ConfigError(f"{setting}: UNet2DModel takes no class as input channels. {_INSTEAD}")
    groups = itertools.groupby(model.down, lambda layer: isinstance(layer, Downsample))
    levels = [list(stages) for is_between, stages in groups if not is_between]
    widths = [level[-1].block.conv1.out_channels for level in levels]
    if model.time_embedding.num_features != widths[0]:
        reason = "UNet2DModel has as many timestep features as first-level channels; begin with 1"
        raise ConfigError(f"model_params.channel_mult: {reason}. {_INSTEAD}")
    num_groups = sorted({m.num_groups for m in model.modules() if isinstance(m, nn.GroupNorm)})
    if len(num_groups) > 1:
        raise ConfigError(
            f"model_params.model_channels, channel_mult: levels of {_listed(widths)} channels: "
            f"their norms have {_listed(num_groups)} groups, UNet2DModel has one number; models "
            f"trained with model_params.norm_groups=8 have it, too. {_INSTEAD}"
        )
    blocks = [module for module in model.modules() if isinstance(module, AttentionBlock)]
    head_dims = sorted({block.qkv.in_channels // block.num_heads for block in blocks})
    if all(block.num_heads == 1 for block in blocks):
        head_dims = [None]  # a single head, as wide as its level
    if len(head_dims) > 1:
        reason = f"the heads have {_listed(head_dims)} channels, UNet2DModel has one number"
        raise ConfigError(f"model_params.num_head_channels: {reason}. {_INSTEAD}")
    attends = [isinstance(level[0].attention, AttentionBlock) for level in levels]
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
        attention_head_dim=head_dims[0],
        norm_num_groups=num_groups[0],
        attn_norm_num_groups=num_groups[0],
        resnet_time_scale_shift="scale_shift" if model.middle[0].block.scale_shift else "default",
        dropout=model.middle[0].block.dropout.p,
        num_class_embeds=model.label_embedding and model.label_embedding.table.num_embeddings,
    )


def to_unet2d(model: UNet, arguments: dict[str, Any]) -> nn.Module:
    """The UNet2DModel of `unet2d_config`'s arguments with the weights of `model`, in eval mode."""
    from diffusers import UNet2DModel

    theirs = UNet2DModel(**arguments)
    names = module_names(len(arguments["block_out_channels"]), arguments["layers_per_block"])
    state = {}
    for key, tensor in model.state_dict().items():
        module, _, parameter = key.rpartition(".")
        parts = tensor.chunk(len(names[module]))
        for name, part in zip(names[module], parts, strict=True):
            full_name = f"{name}.{parameter}"  # there 1x1 convolutions are matrices
            state[full_name] = part.reshape_as(theirs.get_parameter(full_name))
    theirs.load_state_dict(state)
    return theirs.eval().requires_grad_(False)


def module_names(num_levels: int, num_res_blocks: int) -> dict[str, list[str]]:
    """Every module of a UNet that may hold parameters -> those of UNet2DModel."""
    names = dict(_OUTER)
    stages = [(f"middle.{number}", "mid_block", number) for number in range(2)]
    for way, num_stages in (("down", num_res_blocks), ("up", num_res_blocks + 1)):
        for level in range(num_levels):
            first, theirs = level * (num_stages + 1), f"{way}_blocks.{level}"
            stages += [(f"{way}.{first + n}", theirs, n) for n in range(num_stages)]
            names[f"{way}.{first + num_stages}.conv"] = [f"{theirs}.{way}samplers.0.conv"]
    for ours, theirs, number in stages:
        for part, inner in _STAGE.items():
            names[f"{ours}.{part}"] = [f"{theirs}.{name.format(number)}" for name in inner]
    return names


def _listed(numbers: list[int]) -> str:
    return ", ".join(map(str, numbers))
