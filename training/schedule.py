"""How optimizer steps and epochs relate."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Schedule:
    """How far a run trains. Step s ends when s * `batch_size` images have been seen."""

    num_images: int
    batch_size: int
    total_steps: int
    is_extension: bool = False  # a finished run trains on, beyond its config's epochs

    @property
    def steps_per_epoch(self) -> float:
        return self.num_images / self.batch_size

    def epochs_done(self, step: int) -> int:
        return step * self.batch_size // self.num_images

    def is_due(self, step: int, interval: int, start: int = 1) -> bool:
        """True if step `step` completed an epoch that is `start` or a multiple of `interval`."""
        before, now = self.epochs_done(step - 1), self.epochs_done(step)
        if now < start:
            return False
        return before < start or now // interval > before // interval
