"""The evaluation loop: real images, then generated ones, through every collector, on all processes.

A collector that raises drops out on every process, and its metrics are recorded as failed; the
others go on.
"""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from datasets.real import RealSets
from metrics.base import Collector, Entry, Metric, entry
from utils.distributed import Runtime, from_launcher

log = logging.getLogger("diffusion")


@dataclass
class Part:
    """A collector with the metrics that are computed from it."""

    collector: Collector
    metrics: dict[str, Metric] = field(default_factory=dict)
    seconds: float = 0.0  # of work, its own and its metrics', on the present set of images
    error: str | None = None  # why it failed on this process


@contextlib.contextmanager
def threads_of_all(runtime: Runtime) -> Iterator[None]:
    """Compute with the threads of all processes of this node, which wait meanwhile: torchrun gives
    each one thread. Not in a job on CPUs, where other numbers of threads would round otherwise."""
    own, is_gpu = torch.get_num_threads(), runtime.device.type == "cuda"
    torch.set_num_threads(own * (from_launcher("LOCAL_WORLD_SIZE", 1) if is_gpu else 1))
    try:
        yield
    finally:
        torch.set_num_threads(own)


class Scoring:
    """All collectors together: the real images once, then any number of sets of generated ones.

    Every method is to be called on every process. The parts in `alive` have failed on none.
    """

    def __init__(self, parts: Sequence[Part], runtime: Runtime) -> None:
        self.parts, self.alive = list(parts), list(parts)
        self.runtime = runtime

    def update_real(self, real: RealSets | None) -> None:
        """Show the real images, where there are any, to every collector."""
        if real is not None:
            self._each(lambda part: part.collector.update_real(real, self.runtime))
        self.runtime.patient_barrier()  # a classifier may be trained
        self._agree()
        for part in self.alive:
            part.collector.reduce_real(self.runtime)

    def score(
        self, batches: Iterable[Tensor], num_images: int, *, always_sample: bool = False
    ) -> dict[str, Entry]:
        """Score one set of images; returns the entries of all metrics on the main process.

        The `batches` are uint8 (b, C, H, W) on the CPU: this process's `runtime.share(num_images)`,
        contiguous and in order. What they raise on one process is raised there, and a RuntimeError
        on the others. With `always_sample` they are gone through even if no metric is left.
        """
        for part in self.alive:
            part.collector.reset()
        if always_sample or any(part.metrics for part in self.alive):
            self._update(batches, self.runtime.share(num_images).start)
        self._agree()
        for part in self.alive:
            part.collector.reduce(self.runtime)
        entries: dict[str, Entry] = {}

        def compute(part: Part) -> None:
            for name, metric in part.metrics.items():
                entries[name] = metric.compute()
                if entries[name]["value"] is not None:
                    entries[name]["better"] = metric.better

        if self.runtime.is_main:
            with threads_of_all(self.runtime):
                self._each(compute)
        self.runtime.patient_barrier()
        for part in self.parts:
            for name in part.metrics:
                if part.error is not None:
                    entries[name] = entry("failed", None, part.error)
                if name in entries:
                    entries[name]["seconds"] = round(part.seconds, 3)
            part.seconds = 0.0
        return entries

    def _update(self, batches: Iterable[Tensor], start: int) -> None:
        with self.runtime.all_or_none("no images from another process, see its output"):
            for images in batches:
                indices = range(start, start + len(images))
                self._each(lambda part, x=images, i=indices: part.collector.update(x, i))
                start = indices.stop

    def _each(self, call: Callable[[Part], None]) -> None:
        for part in self.alive:
            if part.error is not None:
                continue
            started = time.perf_counter()
            try:
                call(part)
            except Exception as error:
                self._fail(part, f"{type(error).__name__}: {error}")
            part.seconds += time.perf_counter() - started

    def _agree(self) -> None:
        """Drop on every process what failed on one of them."""
        for part in list(self.alive):
            if self.runtime.any(part.error is not None):
                self.alive.remove(part)
                if part.error is None:
                    self._fail(part, "failed on another process, see its output")

    def _fail(self, part: Part, message: str) -> None:
        part.error = message
        name = ", ".join(part.metrics) or type(part.collector).__name__
        log.warning("%s failed and is left out: %s", name, message)
