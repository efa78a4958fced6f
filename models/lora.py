"""Low-rank adapters (LoRA, Hu et al. 2021, arXiv 2106.09685) on a trained backbone, by peft.

A layer W x becomes W x + (alpha / rank) B A x. W stays as it was trained; A and B are small.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping

from torch import Tensor, nn

from models.layers import LabelEmbedding
from utils.errors import require

# as peft names what it puts in the place of a layer
BASE, DOWN, UP = ".base_layer.", ".lora_A.default.weight", ".lora_B.default.weight"


def add_adapters(model: nn.Module, rank: int, alpha: float | None = None) -> None:
    """Freeze `model` in place and give its layers adapters to train; its output is unchanged.

    Adapters go to linear layers and convolutions, but not to depthwise ones, nor to those whose
    weight their owner reads itself (its `reads_weights` names them). The label table is trained as
    it is: a new class needs a row of its own. `alpha` is by default `rank`. Raises a UserError if
    peft is not installed.
    """
    require("peft")
    from peft import LoraConfig, inject_adapter_in_model

    names = "|".join(re.escape(name) for name in _adapted(model))
    scale = rank if alpha is None else alpha
    inject_adapter_in_model(LoraConfig(r=rank, lora_alpha=scale, target_modules=names), model)
    for module in model.modules():
        if isinstance(module, LabelEmbedding):
            module.requires_grad_(True)


def merged_weights(weights: Mapping[str, Tensor], alpha: float | None = None) -> dict[str, Tensor]:
    """The state dict of a plain model, from that of a model with adapters, which are added in.
    `alpha` is the one that `add_adapters` was given."""
    merged = {}
    for name, value in weights.items():
        layer, is_base, leaf = name.partition(BASE)
        if is_base and leaf == "weight":
            down, up = weights[layer + DOWN], weights[layer + UP]  # (r, in, ...), (out, r, ...)
            scale = 1.0 if alpha is None else alpha / len(down)
            product = up.flatten(1) @ down.flatten(1)
            value = value + scale * product.view_as(value)
        if not name.endswith((DOWN, UP)):
            merged[f"{layer}.{leaf}" if is_base else name] = value
    return merged


def _adapted(model: nn.Module) -> Iterator[str]:
    """The names of the layers that get an adapter."""
    for prefix, owner in model.named_modules():
        for name, layer in owner.named_children():
            is_dense = isinstance(layer, nn.Linear | nn.Conv2d) and getattr(layer, "groups", 1) == 1
            if is_dense and name not in getattr(owner, "reads_weights", ()):
                yield f"{prefix}.{name}" if prefix else name
