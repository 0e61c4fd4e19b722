"""Grants: who is behind each connection to a socket with keys, and what it subscribed to."""

from __future__ import annotations

import threading
from collections.abc import Set
from dataclasses import dataclass, field

from maskcast.pipeline.publisher.subscriptions import Subscriptions

MAX_GRANTED = 10_000
"""Subscriptions of one connection; further ones are not granted."""


@dataclass(slots=True)
class _Connection:
    # A message of a former connection with the same number may still be read: hence several keys.
    keys: set[bytes] = field(default_factory=set)
    granted: set[bytes] = field(default_factory=set)


class Grants:
    """The granted subscriptions of each connection, by its file descriptor. Thread-safe."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._connections: dict[int, _Connection] = {}
        self._subscriptions = Subscriptions()

    def open(self, handle: int) -> None:
        """Enter a new connection."""
        self.close(handle)
        with self._lock:
            self._connections[handle] = _Connection()

    def close(self, handle: int) -> None:
        """Enter that a connection is gone."""
        with self._lock:
            connection = self._connections.pop(handle, None)
            for prefix in connection.granted if connection is not None else ():
                self._subscriptions.remove(prefix)

    def identify(self, handle: int, key: bytes) -> None:
        """Enter whose key a connection has. Do it before its rights are looked up."""
        with self._lock:
            if (connection := self._connections.get(handle)) is not None:
                connection.keys.add(key)

    def add(self, handle: int, prefix: bytes) -> bool:
        """Enter a subscription; return whether the connection exists and may have one more."""
        with self._lock:
            connection = self._connections.get(handle)
            if connection is None or len(connection.granted) >= MAX_GRANTED:
                return False
            if prefix not in connection.granted:
                connection.granted.add(prefix)
                self._subscriptions.add(prefix)
            return True

    def remove(self, handle: int, prefix: bytes) -> None:
        """Enter that a subscription was cancelled."""
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
        """Return what is subscribed to."""
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
