"""Backoff: the waits between tries."""

from __future__ import annotations

import random
from collections.abc import Callable


class Backoff:
    """Waits that double from ``first_s`` to ``cap_s``, each shortened at random by up to a half.

    The randomness prevents that many cameras behind one switch are all tried at the same moment.

    Args:
        first_s: the longest first wait, seconds.
        cap_s: the longest wait, seconds.
        uniform: draws from an interval.
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
        """Begin with the short waits again."""
        self._longest_s = self._first_s
