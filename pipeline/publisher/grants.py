"""Grants: the keys and the granted subscriptions of each connection to a socket with keys."""

from __future__ import annotations

import threading
from collections.abc import Set
from dataclasses import dataclass, field

from maskcast.pipeline.publisher.subscriptions import Subscriptions

MAX_GRANTED = 10_000
"""Maximum number of subscriptions of one connection; further ones are not granted."""


@dataclass(slots=True)
class _Connection:
    # Several keys: a message of an earlier connection with the same number may be read late.
    keys: set[bytes] = field(default_factory=set)
    granted: set[bytes] = field(default_factory=set)


class Grants:
    """The granted subscriptions of each connection, by its file descriptor. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._subscriptions = Subscriptions()

    def open(self, handle: int) -> None:
        """Add a new connection."""
        self.close(handle)
        with self._lock:
            self._connections[handle] = _Connection()

    def close(self, handle: int) -> None:
        """Remove a connection that is gone."""
        with self._lock:
            connection = self._connections.pop(handle, None)
            for prefix in connection.granted if connection is not None else ():
                self._subscriptions.remove(prefix)

    def identify(self, handle: int, key: bytes) -> None:
        """Add the key of a connection. Call this before its rights are looked up."""
        with self._lock:
            if (connection := self._connections.get(handle)) is not None:
                connection.keys.add(key)

    def add(self, handle: int, prefix: bytes) -> bool:
        """Add a subscription; return False if the connection is gone or has too many."""
        with self._lock:
            connection = self._connections.get(handle)
            if connection is None or len(connection.granted) >= MAX_GRANTED:
                return False
            if prefix not in connection.granted:
                connection.granted.add(prefix)
                self._subscriptions.add(prefix)
            return True

    def remove(self, handle: int, prefix: bytes) -> None:
        """Remove a subscription that was cancelled."""
        with self._lock:
            connection = self._connections.get(handle)
            if connection is not None and prefix in connection.granted:
                connection.granted.remove(prefix)
                self._subscriptions.remove(prefix)

    def count(self, topic: bytes) -> int:
        """Count the subscriptions to a topic."""
        with self._lock:
            return self._subscriptions.count(topic)

    def prefixes(self) -> set[bytes]:
        """Return all subscribed prefixes."""
        with self._lock:
            return self._subscriptions.prefixes()

    def handles(self, keys: Set[bytes]) -> list[int]:
        """Return the connections of these keys, whether anything was granted to them or not."""
        with self._lock:
            return [
                handle
                for handle, connection in self._connections.items()
                if not connection.keys.isdisjoint(keys)
            ]
