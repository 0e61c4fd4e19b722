"""Backoff: waits between retries, with random jitter."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Waits that double from ``first_s`` to ``cap_s``, each shortened at random by up to half.

    The jitter keeps many cameras behind one switch from reconnecting at the same moment.

    Args:
        first_s: maximum of the first wait, seconds.
        cap_s: maximum of every wait, seconds.
        uniform: draws a number between two bounds.
    """

    def __init__(
        self,
        first_s: float,
        cap_s: float,
        uniform: Callable[[float, float], float] = random.uniform,
    ) -> None:
        self._first_s, self._cap_s = first_s, cap_s
        self._uniform = uniform
        self._longest_s = first_s

    def next_s(self) -> float:
        """Return the next wait, seconds."""
        longest_s = self._longest_s
        self._longest_s = min(self._cap_s, 2 * longest_s)
        return self._uniform(longest_s / 2, longest_s)

    def reset(self) -> None:
        """Start again with the shortest wait."""
        self._longest_s = self._first_s
