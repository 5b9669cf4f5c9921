"""How long a rank may take over a step, or over what is no step, before it is said to be late."""

from __future__ import annotations

SLOW = 3
"""A step may take so many times what one takes..."""
SLACK_S = 60.0
"""...and no step, nor anything else, so many seconds more than was seen before."""
RECENT = 0.1
"""Weight of the newest step in what one takes."""


class Patience:
    """Learns what is usual.

    Args:
        least_s: seconds that anything may take.
        longest_s: seconds that something other than a step took before; infinite where nobody can know.
    """

    def __init__(self, least_s: float, longest_s: float = 0.0) -> None:
        self.least_s, self.longest_s = least_s, longest_s
        self._usual_s, self._steps = 0.0, 0

    def stepped(self, took_s: float) -> None:
        """Take in that a step took so long; the second counts alone, since the first may have been compiled in."""
        self._steps += 1
        self._usual_s += (1.0 if self._steps <= 2 else RECENT) * (took_s - self._usual_s)

    def lasted(self, took_s: float) -> None:
        """Take in that something other than a step took so long."""
        self.longest_s = max(self.longest_s, took_s)

    def for_step_s(self) -> float:
        """Return how long the next step may take, in seconds."""
        if not self._steps:
            return max(self.least_s, SLACK_S)
        return max(self.least_s, min(SLOW * self._usual_s, self._usual_s + SLACK_S))

    def for_other_s(self) -> float:
        """Return how long something other than a step may take, in seconds."""
        return max(self.least_s, self.longest_s + SLACK_S)
