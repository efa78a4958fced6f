"""What trained weights are and mean, and a fresh run that starts from them (`init_from`)."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from models import computing_params
from models.layers import LabelEmbedding
from models.lora import merged_weights
from utils.checkpoint import load_any, misfit, resolve_checkpoint
from utils.config import Config, keys_by_resume
from utils.errors import CheckpointError, show, told_as

# Their values belong to the weights: no other value makes sense with them.
SAME_MODEL = keys_by_resume("architecture", "meaning")
MAX_SHOWN = 10  # parameters in a message

log = logging.getLogger("diffusion")


def weights_of(
    path: Path, state: Mapping[str, Any], *, use_ema: bool | None = None, prefer_ema: bool = True
) -> tuple[dict[str, Tensor], bool]:
    """Which weights a checkpoint means, with adapters merged into them; for all who read one.

    `state` is what `load_any` gave for `path`. `use_ema` asks for averaged or raw weights; None
    takes the averaged ones if there are any and `prefer_ema` says so.

    Returns a state dict for the model as its config describes it, and whether it is averaged.
    Raises a CheckpointError if the file does not hold the weights asked for.
    """
    has_ema = "ema_model_state_dict" in state
    if use_ema and not has_ema:
        raise CheckpointError(f"{path}: holds no EMA weights; use --no_ema")
    is_ema = has_ema and prefer_ema if use_ema is None else use_ema
    weights = state.get("ema_model_state_dict" if is_ema else "model_state_dict")
    if weights is None:
        raise CheckpointError(f"{path}: holds EMA weights alone; leave out --no_ema, use_ema=false")
    if state["config"].get("lora_rank"):
        with told_as(CheckpointError, f"{show(path)}: its adapters do not fit"):
            weights = merged_weights(weights, state["config"]["lora_alpha"])
    return weights, is_ema


def changed_settings(old: dict[str, Any], new: dict[str, Any], keys: Iterable[str]) -> list[str]:
    """A line for each of `keys` whose value differs; of `model_params`, for each argument. Keys
    that are newer than the old config had their defaults."""
    old = {**Config().to_dict(), **old}
    pairs = [(key, old[key], new[key]) for key in keys if key != "model_params"]
    if "model_params" in keys and old.get("model_type") == new["model_type"]:
        before, after = old["model_params"], new["model_params"]
        pairs += [
            (f"model_params.{name}", before.get(name, "unset"), after.get(name, "unset"))
            for name in dict.fromkeys((*before, *after))
            if name not in computing_params(new["model_type"])
        ]
    return [
        f"{name}: {was} in the checkpoint, {now} in the config"
        for name, was, now in pairs
        if was != now
    ]


def load_initial_weights(model: nn.Module, config: Config, class_names: Sequence[str] = ()) -> None:
    """Give a fresh model the weights of `init_from`: nothing else of that run.

    Adapters are merged. Where the numbers of classes differ, those that both have are taken over
    and the others start anew. `class_names`, the data's, are compared with the names there.

    Raises a CheckpointError if the file is missing, damaged, or not of this architecture; it names
    parameters that do not fit, with both shapes, and the model is left as it was.
    """
    path = resolve_checkpoint(config.init_from)
    state = load_any(path)
    weights = _with_our_classes(weights_of(path, state)[0], model)
    ours = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    theirs = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    wrong = [
        f"{name}: {theirs.get(name, 'absent')} in the checkpoint, {ours.get(name, 'absent')} here"
        for name in dict.fromkeys((*ours, *theirs))
        if ours.get(name) != theirs.get(name)
    ]
    if wrong:
        more = [f"and {len(wrong) - MAX_SHOWN} more"] if len(wrong) > MAX_SHOWN else []
        raise CheckpointError(
            f"init_from={config.init_from}: {path} is of another architecture:\n       "
            + "\n       ".join([*wrong[:MAX_SHOWN], *more])
        )
    if problem := misfit(weights, model.state_dict()):
        raise CheckpointError(f"init_from={config.init_from}: {show(path)}: {problem}")
    # What the weights were trained to mean, and their shapes do not tell.
    for line in changed_settings(state["config"], config.to_dict(), keys_by_resume("meaning")):
        log.warning("init_from: %s", line)
    pairs = zip(state.get("class_names") or (), class_names, strict=False)
    other = [f"{there} is now {here}" for there, here in pairs if there != here]
    if config.conditional and other:
        words = "init_from: classes go by their numbers, and %d have another name: %s"
        log.warning(words, len(other), ", ".join(other[:MAX_SHOWN]))
    model.load_state_dict(weights)
    log.info("weights of %s, step %d", path, state["step"])


def _with_our_classes(weights: dict[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """The weights, with as many rows in the label table as `model` has."""
    fitted = dict(weights)
    for prefix, module in model.named_modules():
        name = f"{prefix}.table.weight"
        if not isinstance(module, LabelEmbedding) or name not in weights:
            continue
        ours, theirs = module.table.weight.detach(), weights[name]
        if len(ours) != len(theirs) and ours.shape[1:] == theirs.shape[1:]:
            fitted[name] = torch.cat([theirs[: len(ours)], ours.to(theirs.device)[len(theirs) :]])
            log.warning(
                f"init_from: {len(theirs) - 1} classes there, {len(ours) - 1} here: taken over "
                "class by class, new ones are untrained"
            )
    return fitted
