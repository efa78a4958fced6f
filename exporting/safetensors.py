"""Weights to hand on: a `.safetensors` file that other programs read, with the config in it."""

from __future__ import annotations

import json
from pathlib import Path

from generation.run import Run
from utils.checkpoint import FORMAT_VERSION, WEIGHTS_CHECKSUM, WEIGHTS_FACTS, checksum_of_weights
from utils.files import atomic_path, write_text


def save_weights(path: Path, run: Run, card: str) -> None:
    """Write the weights of a run to `path`, whole, which `load_weights` reads, and the card beside
    it as NAME.md; or raise an OSError.

    What a checkpoint says of its weights stands in the file's metadata, each fact as JSON. Adapters
    are a part of the weights already, so the config in the file has none.
    """
    from safetensors.torch import save

    weights = {name: tensor.cpu().contiguous() for name, tensor in run.model.state_dict().items()}
    config = run.config.to_dict() | {"lora_rank": 0}
    values = (FORMAT_VERSION, config, run.spec, run.step, run.epoch, run.ema)
    facts = {name: json.dumps(value) for name, value in zip(WEIGHTS_FACTS, values, strict=True)}
    facts |= {"values": json.dumps(run.values)} if run.values else {}
    checksum = {WEIGHTS_CHECKSUM: checksum_of_weights(weights, facts)}
    with atomic_path(path.with_suffix(".md")) as beside, atomic_path(path) as temporary:
        write_text(beside, card)
        # not their save_file, whose files nobody but their owner may read
        temporary.write_bytes(save(weights, metadata={"format": "pt"} | facts | checksum))
