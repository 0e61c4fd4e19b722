"""Subscriptions: how many want which topics, as far as an XPUB socket tells."""

from __future__ import annotations

MOST_PREFIXES = 4096
"""So many different prefixes are kept apart: a peer may invent them without end."""


class Subscriptions:
    """Counts subscriptions by prefix; in doubt, too many rather than too few.

    To count too few would keep from a subscriber what he asked for. Hence a peer's own
    unsubscribing is not to be entered: XPUB hands it on whether he had subscribed or not, and he
    could cancel what others want. What counts is that a connection is gone.
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._uncounted = 0

    def add(self, prefix: bytes) -> None:
        """Enter a subscription."""
        if prefix in self._counts:
            self._counts[prefix] += 1
        elif len(self._counts) < MOST_PREFIXES:
            self._counts[prefix] = 1
        else:
            self._uncounted += 1

    def drop(self, prefix: bytes) -> None:
        """Enter that one who had subscribed is gone."""
        count = self._counts.get(prefix, 0)
        if count > 1:
            self._counts[prefix] = count - 1
        elif count:
            del self._counts[prefix]
        else:
            self._uncounted = max(self._uncounted - 1, 0)

    def to(self, topic: bytes) -> int:
        """Count those to a topic; at least 1 while there are any that were not kept apart."""
        prefixes = (topic[:end] for end in range(len(topic) + 1))
        return sum(self._counts.get(prefix, 0) for prefix in prefixes) + bool(self._uncounted)
