"""Ctrl-C and SIGTERM as a flag that the training loop reads."""

from __future__ import annotations

import os
import signal
import time
from types import FrameType

REPEAT_SECONDS = 1.0  # torchrun and the terminal may both deliver the same Ctrl-C


class StopSignal:
    """Context manager: `.requested` becomes True at SIGINT or SIGTERM.

    A second Ctrl-C, more than a second later, ends the process at once.
    """

    def __init__(self) -> None:
        self.requested = False
        self._first_time = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> StopSignal:
        for number in (signal.SIGINT, signal.SIGTERM):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if not self.requested:
            self.requested, self._first_time = True, now
        elif number == signal.SIGINT and now - self._first_time > REPEAT_SECONDS:
            os._exit(128 + number)
