"""How likely a model finds real images that it has not seen: bits per dimension."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from datasets.real import chosen_images
from metrics.base import Collector, Context, Entry, Metric, measured, number
from utils.distributed import Runtime
from utils.images import to_float
from utils.rng import EvaluationDraw, Stream, numpy_generator

NUM_IMAGES, BATCH = 128, 16  # each takes a hundred forwards, with gradients


class Nll(Metric, Collector):
    """The negative log-likelihood of real images, of the test split if there is one, in bits per
    value, by the probability-flow ODE (see `diffusion.likelihood`).

    Noise of a grey level's width makes it a bound from above (Theis et al. 2016). That noise and
    the probes of Hutchinson's estimate follow from an image's index alone. It says nothing of the
    images that are drawn, of guidance or samplers; each set of a sweep measures its own weights.
    """

    better = "lower"
    real_images = True
    likelihood = True

    def __init__(self, context: Context) -> None:
        sets, self.model = context.real.sets, context.generated.likelihood
        real, self.runtime = sets.test or sets.train, context.runtime
        self.real = replace(real, indices=chosen_images(len(real.dataset), NUM_IMAGES))
        self.bits: dict[int, float] = {}  # by index, of this process's share
        self.version: int | None = None

    def update(self, images: Tensor, indices: range) -> None:
        if self.version == self.model.version:  # these weights have been measured
            return
        self.version, self.bits = self.model.version, {}
        share = self.real.share(self.runtime)
        for start in range(0, len(share), BATCH):
            part = share[start : start + BATCH]
            x, y = self.real.load(part)
            draws = [numpy_generator(0, Stream.EVALUATION, EvaluationDraw.GAPS, i) for i in part]
            gaps = np.stack([rng.random(x.shape[1:], np.float32) - 0.5 for rng in draws])
            probes = np.stack([rng.integers(2, size=x.shape[1:]) * 2 - 1 for rng in draws])
            x = to_float(x).cpu() + torch.from_numpy(gaps) / 127.5
            nats = self.model(x, y, torch.from_numpy(probes).float()).cpu() / x[0].numel()
            of_each = math.log2(127.5) - nats / math.log(2)
            self.bits |= dict(zip(part, of_each.tolist(), strict=True))

    def reduce(self, runtime: Runtime) -> None:
        shares = runtime.gather_objects(self.bits)
        self.bits = {index: bits for share in shares for index, bits in share.items()}

    def compute(self) -> Entry:
        bits = torch.tensor([*self.bits.values()], dtype=torch.float64)
        error = float(bits.std() / math.sqrt(len(bits))) if len(bits) > 1 else None
        facts = {"n": len(bits), "forwards": self.model.num_forwards}
        return measured(float(bits.mean()), standard_error=error, split=self.real.split, **facts)

    def files(self) -> dict[str, str]:
        rows = [f"{index},{bits:.6f}\n" for index, bits in sorted(self.bits.items())]
        return {"nll.csv": "".join(["index,bits_per_dimension\n", *rows])}

    @classmethod
    def note(cls, result: Entry) -> str:
        error, count = number(result["standard_error"]), result["n"]
        return f"bits per value, +- {error}, {count} images of {result['split']}"
