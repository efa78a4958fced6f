"""Weights to hand on: a `.safetensors` file that other programs read, with the config in it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.func import functional_call

from generation.run import Run
from utils.checkpoint import FORMAT_VERSION, WEIGHTS_CHECKSUM, WEIGHTS_FACTS, checksum_of_weights
from utils.config import condition_channels
from utils.errors import UserError
from utils.files import atomic_path, write_text


def output_difference(run: Run, other: Callable[..., Tensor]) -> float:
    """How far the outputs of another network, a function of (x, t, y), are from the run's, over the
    largest of these: for noise at timesteps from end to end, with classes and none."""
    spec, num_classes = run.spec, run.spec.num_classes if run.config.conditional else 0
    channels = spec.channels + condition_channels(run.config, spec.channels)
    t = torch.linspace(0, run.config.num_timesteps - 1, 4).long()
    shape = len(t), channels, spec.height, spec.width
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    y = torch.arange(len(t)) % (num_classes + 1) - 1 if num_classes else None  # the first is null
    with torch.inference_mode():
        ours, theirs = run.model(x, t, y), other(x, t, y)
    return ((ours - theirs).abs().max() / ours.abs().max().clamp(min=1e-3)).item()


def weights_in(run: Run, dtype: str) -> tuple[dict[str, Tensor], float]:
    """The run's weights, those of float32 in `dtype`, and the `output_difference` of rounding them.
    Raises a UserError if a weight is too large for that."""
    exact = {name: tensor.contiguous() for name, tensor in run.model.state_dict().items()}
    if dtype == "float32":
        return exact, 0.0
    weights = {k: v.half() if v.dtype == torch.float32 else v for k, v in exact.items()}
    if wrong := [name for name, tensor in weights.items() if not tensor.isfinite().all()]:
        raise UserError(f"--dtype {dtype}: {wrong[0]} has values beyond 65504; leave it out")
    back = {name: weights[name].to(tensor) for name, tensor in exact.items()}
    return weights, output_difference(run, lambda *given: functional_call(run.model, back, given))


def save_weights(path: Path, run: Run, weights: dict[str, Tensor], dtype: str, card: str) -> None:
    """Write the weights of a run, as `weights_in` gives them, to `path`, whole, which
    `load_weights` reads, and the card beside it as NAME.md; or raise an OSError.

    What a checkpoint says of its weights stands in the file's metadata, each fact as JSON. Adapters
    are a part of the weights already, so the config in the file has none.
    """
    from safetensors.torch import save

    config = run.config.to_dict() | {"lora_rank": 0}
    values = (FORMAT_VERSION, config, run.spec, run.step, run.epoch, run.ema, run.values)
    values += (run.class_names or None, None if dtype == "float32" else dtype)
    facts = zip(WEIGHTS_FACTS, values, strict=True)
    facts = {name: json.dumps(value) for name, value in facts if value is not None}
    checksum = {WEIGHTS_CHECKSUM: checksum_of_weights(weights, facts)}
    with atomic_path(path.with_suffix(".md")) as beside, atomic_path(path) as temporary:
        write_text(beside, card)
        # not their save_file, whose files nobody but their owner may read
        temporary.write_bytes(save(weights, metadata={"format": "pt"} | facts | checksum))
