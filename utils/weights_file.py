"""Weights to hand on: a `.safetensors` file that other programs read, with the config in it."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from utils.checkpoint import FORMAT_VERSION, check_state, load_checkpoint
from utils.errors import CheckpointError, require
from utils.images import ImageSpec

SUFFIX = ".safetensors"
FACTS = ("format_version", "config", "spec", "step", "epoch", "ema")
CHECKSUM = "crc32"


def save_weights(
    path: Path,
    weights: Mapping[str, Tensor],
    *,
    config: Mapping[str, Any],
    spec: ImageSpec,
    step: int,
    epoch: int,
    ema: bool,
) -> None:
    """Write the file whole or not at all. The facts stand in its metadata, each as JSON.

    Args:
        ema: whether the weights are averaged ones.

    Raises:
        UserError: safetensors is not installed.
        OSError: the disk refused.
    """
    require("safetensors")
    from safetensors.torch import save

    weights = {name: tensor.cpu().contiguous() for name, tensor in weights.items()}
    values = (FORMAT_VERSION, config, spec, step, epoch, ema)
    texts = {name: json.dumps(value) for name, value in zip(FACTS, values, strict=True)}
    metadata = texts | {CHECKSUM: _checksum(weights, texts)}
    temporary = path.with_name(f"{path.name}.tmp-{os.getpid()}")
    try:
        # not their save_file, whose files nobody but their owner may read
        temporary.write_bytes(save(weights, metadata={"format": "pt", **metadata}))
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def load_weights(path: Path) -> dict[str, Any]:
    """What `load_checkpoint` gives, as far as `save_weights` wrote it: `ema_model_state_dict` or
    `model_state_dict`, `config`, `spec`, `step`, `epoch`.

    Raises:
        CheckpointError: missing, damaged, or not written by `save_weights`.
        UserError: safetensors is not installed.
    """
    require("safetensors")
    from safetensors import safe_open

    if not path.is_file():
        raise CheckpointError(f"{path}: no such file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{path}: cannot be read as safetensors ({reason})") from error
    missing = [name for name in (*FACTS, CHECKSUM) if name not in metadata]
    if missing:
        raise CheckpointError(f"{path}: not written by export.py, its metadata lacks {missing}")
    texts = {name: metadata[name] for name in FACTS}
    if metadata[CHECKSUM] != _checksum(weights, texts):
        raise CheckpointError(f"{path}: damaged (it is not what was written)")
    state = {name: json.loads(text) for name, text in texts.items()}
    check_state(path, state | {"model_state_dict": weights})
    kind = "ema_model_state_dict" if state.pop("ema") else "model_state_dict"
    return state | {kind: weights}


def load_any(path: Path) -> dict[str, Any]:
    """A checkpoint, or what `save_weights` wrote, as the file's name tells.

    Raises:
        CheckpointError: missing or damaged.
        UserError: safetensors is needed and not installed.
    """
    return load_weights(path) if path.suffix == SUFFIX else load_checkpoint(path)


def _checksum(weights: Mapping[str, Tensor], texts: Mapping[str, str]) -> str:
    """Of names, values and texts; safetensors itself has none."""
    value = zlib.crc32(json.dumps([sorted(weights), texts], sort_keys=True).encode())
    for name in sorted(weights):
        value = zlib.crc32(weights[name].flatten().view(torch.uint8).numpy(), value)
    return f"{value:08x}"
