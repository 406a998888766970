"""Ctrl-C as a count that the loop looks at, so that a row is never torn; the third press raises as usual."""

import signal
from types import FrameType
from typing import Any


class Interrupts:
    """Counts presses of Ctrl-C while it is entered."""

    def __init__(self) -> None:
        self.n_presses = 0
        self._previous: Any = None

    def __enter__(self) -> "Interrupts":
        self._previous = signal.signal(signal.SIGINT, self._press)
        return self

    def __exit__(self, *_: object) -> None:
        signal.signal(signal.SIGINT, self._previous)

    def _press(self, number: int, frame: FrameType | None) -> None:
        self.n_presses += 1
        if self.n_presses > 2:
            raise KeyboardInterrupt
