"""Receiver: receives the messages of one publisher without decoding them."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Self

import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.subscriber.connection import Connection
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import check_endpoint
from maskcast.pipeline.wire.message import VERSION, check_source_name
from maskcast.pipeline.wire.recording import RawMessage

MAX_MESSAGE_BYTES = 64 << 20

HIGH_WATER_MARK = 1000

MAX_PARTS = 64
"""Maximum number of parts that are kept; later versions may add parts to the current six."""


class Receiver:
    """Receives from one endpoint, and reconnects. Not thread-safe. Use it as a context manager.

    Args:
        endpoint: "tcp://host:port" or "ipc:///path".
        sources: names of the sources; None for all.
        keys: for CURVE; None for no encryption.

    Attributes:
        oversized: number of messages that were discarded because they were too long.

    Raises:
        InputError: the endpoint or a name is invalid.
    """

    def __init__(
        self, endpoint: str, sources: Sequence[str] | None = None, keys: ClientKeys | None = None
    ) -> None:
        check_endpoint(endpoint, "tcp://host:5555")
        names = [""] if sources is None else [f"{check_source_name(name)}/" for name in sources]
        self.oversized = 0
        self._context = zmq.Context()
        try:
            self._connection = Connection(
                self._context,
                endpoint,
                [f"{VERSION}/{name}" for name in names],
                high_water_mark=HIGH_WATER_MARK,
                max_message_bytes=MAX_MESSAGE_BYTES,
                keys=keys,
            )
        except BaseException:
            self._context.term()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._connection.close()
        self._context.term()

    def receive(self, timeout_s: float) -> RawMessage | None:
        """Wait for a message; return None if none arrives within ``timeout_s``."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self._connection.process_events()
            due_s = self._connection.replace_if_due()
            parts = self._connection.receive(MAX_PARTS)
            oversized = self._connection.take_oversized()
            self.oversized += oversized
            if parts is not None:
                return RawMessage(parts, time.time_ns())
            if oversized:
                continue  # more messages may be queued
            left_s = deadline_s - time.monotonic()
            if left_s <= 0:
                return None
            poller = zmq.Poller()
            poller.register(self._connection.socket, zmq.POLLIN)
            poller.register(self._connection.monitor, zmq.POLLIN)
            poller.poll(int(min(left_s, left_s if due_s is None else due_s) * 1000) + 1)


def read_client_keys(
    server_key: str | Path | None, client_key: str | Path | None
) -> ClientKeys | None:
    """Read the keys of a subscriber from files; None if none are given.

    Raises:
        InputError: only one of them is given, or one cannot be read.
    """
    if server_key is not None and client_key is not None:
        return ClientKeys.read(server_key, client_key)
    if server_key is not None or client_key is not None:
        raise InputError(
            "keys go together: only one is given; give the server's .key and the client's "
            ".key_secret"
        )
    return None
