"""Ctrl-C, SIGTERM and SIGUSR1 as a flag that the training loop reads."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)  # SLURM warns by the last one
REPEAT_SECONDS = 1.0  # torchrun and the terminal may both deliver the same signal


class StopSignal:
    """A context manager whose `name` becomes that of the first of `SIGNALS` that arrives.

    A second SIGINT, or a second SIGTERM, more than a second after the first of its kind, ends the
    process at once. A warning by SIGUSR1 may be followed by a SIGTERM: that is no second one. A
    SIGHUP, which a terminal sends as it closes, ends nothing.
    """

    def __init__(self) -> None:
        self.name: str | None = None
        self._first_time: dict[int, float] = {}

    def __enter__(self) -> StopSignal:
        self._previous = {number: signal.signal(number, self._handle) for number in SIGNALS}
        self._previous[signal.SIGHUP] = signal.signal(signal.SIGHUP, signal.SIG_IGN)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            if handler is not None:  # None: set outside Python, which cannot bring it back
                signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        first = self._first_time.setdefault(number, now)
        if self.name is None:
            self.name = signal.Signals(number).name
        elif number != signal.SIGUSR1 and now - first > REPEAT_SECONDS:
            os._exit(128 + number)
