"""Subscriptions: counts subscriptions by topic prefix, as an XPUB socket reports them."""

from __future__ import annotations

MAX_PREFIXES = 4096
"""Maximum number of prefixes counted separately, because a peer could send any number."""


class Subscriptions:
    """Counts subscriptions by prefix. The count may be too high, but never too low.

    A count that is too low would withhold messages from a subscriber. Call ``remove`` only for lost
    connections, not when a peer unsubscribes: XPUB also reports that if the peer never subscribed,
    so one peer could cancel the subscriptions of others.
    """

    def __init__(self) -> None:
        self._counts: dict[bytes, int] = {}
        self._uncounted = 0
        self._topic_counts: dict[bytes, int] = {}  # a cache, until the next change

    def add(self, prefix: bytes) -> None:
        """Count a subscription."""
        self._topic_counts.clear()
        if prefix in self._counts:
            self._counts[prefix] += 1
        elif len(self._counts) < MAX_PREFIXES:
            self._counts[prefix] = 1
        else:
            self._uncounted += 1

    def remove(self, prefix: bytes) -> None:
        """Remove a subscription of a connection that is gone."""
        self._topic_counts.clear()
        count = self._counts.get(prefix, 0)
        if count > 1:
            self._counts[prefix] = count - 1
        elif count:
            del self._counts[prefix]
        else:
            self._uncounted = max(self._uncounted - 1, 0)

    def prefixes(self) -> set[bytes]:
        """Return the subscribed prefixes; only the empty one if some are not counted separately."""
        return {b""} if self._uncounted else {*self._counts}

    def count(self, topic: bytes) -> int:
        """Count the subscriptions to a topic; at least 1 while some are not counted separately."""
        if (known := self._topic_counts.get(topic)) is not None:
            return known
        prefixes = (topic[:end] for end in range(len(topic) + 1))
        count = sum(self._counts.get(prefix, 0) for prefix in prefixes) + bool(self._uncounted)
        if len(self._topic_counts) >= MAX_PREFIXES:
            self._topic_counts.clear()
        self._topic_counts[topic] = count
        return count
