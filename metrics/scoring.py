"""The evaluation loop: real images, then generated ones, through every scorer, over all processes.

A scorer that raises drops out on every process and is recorded as failed; the others go on. For
that, a scorer's local work and its collectives are separate methods: no process can be left waiting
in a reduction that another one never reaches.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

from torch import Tensor

from datasets.real import RealSets
from utils.distributed import Runtime

Entry = dict[str, Any]  # one metric in the report: status, value, reason, ... as plain JSON types
Batches = Iterable[tuple[Tensor, "list[int] | None", Any]]  # as `sample.generate` yields them


def entry(status: str, value: Any = None, reason: str | None = None, **details: Any) -> Entry:
    """status: ok | skipped | unreliable | failed. `value` is None where there is none."""
    return {"status": status, "value": value, "reason": reason, **details}


class Scorer(Protocol):
    """One network and the metrics that it gives. Called in the order of the methods below; after
    `clear`, from `see_generated` on, for other generated images."""

    names: tuple[str, ...]

    def see_real(self, real: RealSets | None, runtime: Runtime) -> None:
        """Local work on real images. May raise; must not communicate."""
        ...

    def reduce_real(self, runtime: Runtime) -> None:
        """Collectives only."""
        ...

    def see_generated(self, images: Tensor, labels: list[int] | None, indices: range) -> None:
        """Add uint8 CPU images (b, C, H, W) with these global indices. Must not communicate."""
        ...

    def reduce_generated(self, runtime: Runtime) -> None:
        """Collectives only."""
        ...

    def results(self) -> dict[str, Entry]:
        """An entry for each of `names`. Called on the main process alone."""
        ...

    def clear(self) -> None:
        """Forget the generated images, not the real ones."""
        ...


def run_scorers(
    scorers: Sequence[Scorer],
    *,
    real: RealSets | None,
    batches: Batches,
    num_images: int,
    runtime: Runtime,
    warn: Callable[[str], None] = lambda _: None,
    always_sample: bool = False,
) -> dict[str, Entry]:
    """One set of generated images, see `Scoring`."""
    scoring = Scoring(scorers, runtime=runtime, warn=warn)
    scoring.see_real(real)
    return scoring.score(batches, num_images, always_sample=always_sample)


class Scoring:
    """All scorers together: the real images once, then any number of sets of generated ones.

    Args:
        warn: told once about each scorer that fails.
    """

    def __init__(
        self,
        scorers: Sequence[Scorer],
        *,
        runtime: Runtime,
        warn: Callable[[str], None] = lambda _: None,
    ) -> None:
        self.scorers = list(scorers)
        self.alive = list(scorers)
        self.runtime = runtime
        self.warn = warn
        self.errors: dict[int, str] = {}
        self.seconds = {id(scorer): 0.0 for scorer in scorers}

    def see_real(self, real: RealSets | None) -> None:
        self.each(lambda scorer: scorer.see_real(real, self.runtime))
        self.runtime.patient_barrier()  # a classifier may be trained
        self.agree()
        for scorer in self.alive:
            scorer.reduce_real(self.runtime)

    def score(
        self, batches: Batches, num_images: int, *, always_sample: bool = False
    ) -> dict[str, Entry]:
        """Score this process's `runtime.share(num_images)`, contiguous and in order.

        Args:
            always_sample: go through `batches` even if no scorer is left.

        Returns:
            metric name -> entry, complete on the main process only.

        Raises:
            Exception: whatever `batches` raises on one process, a RuntimeError on the others.
        """
        for scorer in self.alive:
            scorer.clear()
        if any(scorer.names for scorer in self.alive) or always_sample:
            self._see_generated(batches, self.runtime.share(num_images).start)
        self.agree()
        for scorer in self.alive:
            scorer.reduce_generated(self.runtime)
        entries: dict[str, Entry] = {}
        if self.runtime.is_main:
            self.each(lambda scorer: entries.update(scorer.results()))
        self.runtime.patient_barrier()
        for scorer in self.scorers:
            for name in scorer.names:
                if id(scorer) in self.errors:
                    entries[name] = entry("failed", None, self.errors[id(scorer)])
                if name in entries:
                    entries[name]["seconds"] = round(self.seconds[id(scorer)], 3)
            self.seconds[id(scorer)] = 0.0
        return entries

    def _see_generated(self, batches: Batches, start: int) -> None:
        error = None
        try:
            for images, labels, _ in batches:
                indices = range(start, start + len(images))
                self.each(lambda s, x=images, y=labels, i=indices: s.see_generated(x, y, i))
                start = indices.stop
        except Exception as failure:
            error = failure
        if self.runtime.any(error is not None):  # nobody may wait for a process that has given up
            raise error or RuntimeError("no images from another process, see its output")

    def each(self, call: Callable[[Scorer], None]) -> None:
        for scorer in self.alive:
            if id(scorer) in self.errors:
                continue
            started = time.perf_counter()
            try:
                call(scorer)
            except Exception as error:
                self._fail(scorer, f"{type(error).__name__}: {error}")
            self.seconds[id(scorer)] += time.perf_counter() - started

    def agree(self) -> None:
        """Drop on every process what failed on one of them."""
        for scorer in list(self.alive):
            if self.runtime.any(id(scorer) in self.errors):
                self.alive.remove(scorer)
                if id(scorer) not in self.errors:
                    self._fail(scorer, "failed on another process, see its output")

    def _fail(self, scorer: Scorer, message: str) -> None:
        self.errors[id(scorer)] = message
        self.warn(f"{', '.join(scorer.names)} failed and is left out: {message}")
