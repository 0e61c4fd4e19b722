"""Connection: a SUB socket to one endpoint that recovers where libzmq does not."""

from __future__ import annotations

from collections.abc import Sequence

import zmq

from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import set_common_options
from maskcast.pipeline.wire.reconnecting import MIN_BACKOFF_S, ReconnectingSocket


class Connection(ReconnectingSocket):
    """A SUB socket to one publisher or gateway.

    Args:
        context: the ZeroMQ context; the caller terminates it.
        endpoint: "tcp://host:port" or "ipc:///path".
        prefixes: topic prefixes to subscribe to.
        high_water_mark: maximum number of messages queued in the socket.
        max_message_bytes: longer messages are discarded; a longer part closes the connection.
        keys: for CURVE; None for no encryption.

    Raises:
        InputError: the endpoint cannot be connected to.
    """

    def __init__(
        self,
        context: zmq.Context[zmq.Socket[bytes]],
        endpoint: str,
        prefixes: Sequence[str],
        *,
        high_water_mark: int,
        max_message_bytes: int,
        keys: ClientKeys | None,
    ) -> None:
        self._prefixes = tuple(prefixes)
        self._high_water_mark = high_water_mark
        self._max_message_bytes = max_message_bytes
        self._oversized = 0
        self._oversized_reported = False
        super().__init__(context, endpoint, kind=zmq.SUB, keys=keys, peer="publisher")

    def receive(self, max_parts: int) -> list[bytes] | None:
        """Receive a message without waiting; None if there is none, or if it is too long.

        Args:
            max_parts: maximum number of parts; further parts are discarded.

        Raises:
            zmq.ContextTerminated: the context was terminated.
        """
        parts, size = receive_parts(self.socket, self._max_message_bytes, max_parts)
        if parts is None:
            if size:
                self._count_oversized()
            return None
        self._backoff_s = MIN_BACKOFF_S
        self.problem = ""
        return parts

    def take_oversized(self) -> int:
        """Return the number of messages that were too long since the last call."""
        count, self._oversized = self._oversized, 0
        return count

    def _on_abandoned(self) -> None:
        self._count_oversized()

    def _prepare(self, socket: zmq.Socket[bytes]) -> None:
        set_common_options(socket, linger_ms=0, max_part_bytes=self._max_message_bytes)
        socket.set(zmq.RCVHWM, self._high_water_mark)
        for prefix in self._prefixes:
            socket.subscribe(prefix)

    def _count_oversized(self) -> None:
        self._oversized += 1
        self.problem = f"a message is longer than {self._max_message_bytes} bytes"
        if not self._oversized_reported:
            self._oversized_reported = True
            self._log(advice="raise max_message_bytes if such messages are expected")


def receive_parts(
    socket: zmq.Socket[bytes], max_message_bytes: int, max_parts: int
) -> tuple[list[bytes] | None, int]:
    """Receive a message without waiting.

    Args:
        socket: a socket to receive from.
        max_message_bytes: maximum size; a longer message is discarded.
        max_parts: maximum number of parts; further parts are discarded.

    Returns:
        The parts, or None if there was no message or it was too long, and the size in bytes.
    """
    parts: list[bytes] = []
    size = 0
    try:
        while True:
            part = socket.recv(zmq.DONTWAIT, copy=False)
            size += len(part)
            if size <= max_message_bytes and len(parts) < max_parts:
                parts.append(part.bytes)
            if not part.more:
                break
    except zmq.Again:  # there is no message: the parts of a message arrive together
        return None, 0
    return (parts if size <= max_message_bytes else None), size
