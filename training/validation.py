"""The loss on images that are not trained on: what a model has learnt, not what it remembers."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from datasets import ImageDataset
from datasets.conditions import planes_at
from datasets.loader import image_batches
from datasets.real import chosen_images
from diffusion.guidance import conditioned
from training.job import Job
from training.objective import QUARTILES, Example, quartile_of
from training.sharding import full_model
from utils.config import Config
from utils.distributed import Runtime
from utils.images import to_float
from utils.precision import autocast
from utils.rng import Stream, derive_seed, numpy_generator, sample_noise

VAL_LEVELS = 8  # timesteps that each image meets, one in each eighth of T
IMAGES_AT_ONCE = 8  # a forward has 64 rows, no more than one of a preview

log = logging.getLogger("diffusion")


def validation_examples(
    config: Config, dataset: ImageDataset, runtime: Runtime
) -> Iterator[Example]:
    """Yield this rank's share of `val_num_samples` images, each at `VAL_LEVELS` timesteps.

    An image's timesteps and noise follow from its index in `dataset` alone, whatever the seed of
    the run. The batches are the same on any number of processes, so that no rounding differs.
    """
    chosen, T = chosen_images(len(dataset), config.val_num_samples), config.num_timesteps
    share = runtime.share(math.ceil(len(chosen) / IMAGES_AT_ONCE))
    chosen = chosen[share.start * IMAGES_AT_ONCE : share.stop * IMAGES_AT_ONCE]
    loaded = image_batches(dataset, chosen, IMAGES_AT_ONCE, num_workers=config.num_workers)
    for start, batch in zip(range(0, len(chosen), IMAGES_AT_ONCE), loaded, strict=True):
        keys = [(0, Stream.VALIDATION, k) for k in chosen[start : start + IMAGES_AT_ONCE]]
        within = np.stack([numpy_generator(*key).integers(T, size=VAL_LEVELS) for key in keys])
        t = torch.from_numpy((np.arange(VAL_LEVELS) * T + within) // VAL_LEVELS).flatten()
        draw = sample_noise([derive_seed(*key) for key in keys], runtime.device)
        noise = draw((len(keys), VAL_LEVELS, *dataset.spec.shape)).flatten(0, 1)
        images, labels = (x.to(runtime.device).repeat_interleave(VAL_LEVELS, 0) for x in batch)
        y = labels if config.conditional else None
        planes = None
        if config.condition is not None:
            planes = planes_at(config, dataset, chosen, slice(start, start + IMAGES_AT_ONCE))
            planes = planes.to(runtime.device).repeat_interleave(VAL_LEVELS, 0)
        yield Example(to_float(images), y, t.to(runtime.device), noise, planes)


@torch.no_grad()
def validate(job: Job, model: nn.Module, epoch: int, step: int) -> dict[str, float]:
    """The mean loss of `validation_examples`, without dropout, and of each quarter of T.

    Names, `loss` and `loss_q1` to `loss_q4`, to values, the same on every rank. A collective. The
    model stays in eval mode; the trainer puts it back.
    """
    started, config, runtime = time.monotonic(), job.config, job.runtime
    whole, device = full_model(model).eval(), runtime.device
    rows = [torch.zeros(2, 0, device=device)]  # losses, and the quartiles that they are of
    with runtime.all_or_none("it failed on another process"), autocast(job.precision, device):
        for example in validation_examples(config, job.held_out, runtime):
            quartile = quartile_of(example.t, config.num_timesteps)
            network = conditioned(whole, example.planes)
            rows.append(torch.stack([job.process.loss(network, *example[:-1]), quartile]))
        losses, quartiles = torch.cat(rows, 1).cpu().double()
    weights = losses, torch.ones_like(losses)
    totals = [torch.bincount(quartiles.long(), weight, len(QUARTILES)) for weight in weights]
    # float64 again: of no images (a rank's share may be none) bincount makes int64
    sums, counts = runtime.all_reduce(torch.stack(totals).double()).tolist()
    loss, seconds = sum(sums) / sum(counts), time.monotonic() - started
    log.info(f"validation: epoch {epoch}, loss {loss:.4f}, {seconds:.1f} s")
    names = [name.removeprefix("train/") for name in QUARTILES]
    means = {name: x / n for name, x, n in zip(names, sums, counts, strict=True) if n}
    return {"loss": loss, **means}
