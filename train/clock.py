"""What of a run's time is training: neither measurements on the way nor waiting for checkpoints."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class TrainingClock:
    """Tells from lap to lap how long was trained.

    Args:
        now: seconds that only go up.

    Attributes:
        evaluate_s: seconds that measurements have taken so far.
    """

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self.now = now
        self.evaluate_s = 0.0
        self._begun, self._aside_s = now(), 0.0

    @contextmanager
    def measuring(self) -> Iterator[None]:
        """Count the block as a measurement."""
        begun = self.now()
        try:
            yield
        finally:
            self.evaluate_s += self.now() - begun

    def lap(self, pause_s: float) -> float:
        """Begin another lap; return the seconds of the last one that were training.

        Args:
            pause_s: seconds that were waited for checkpoints so far.
        """
        now, aside_s = self.now(), self.evaluate_s + pause_s
        trained_s = now - self._begun - (aside_s - self._aside_s)
        self._begun, self._aside_s = now, aside_s
        return max(trained_s, 1e-9)
