"""Fixtures for pipelines: publishers, and a link that damages RTSP packets."""

from __future__ import annotations

import contextlib
import gc
import socket
import threading
from collections.abc import Callable, Iterator

import pytest
from publishers import NAMES, Script

from maskcast.pipeline.publisher.publisher import Publisher

RtpFault = Callable[[int, bytearray], list[bytes]]
"""Returns the packets that arrive in place of a connection's n-th RTP packet."""


class FaultyLink:
    """Forwards RTSP over TCP between a camera and its reader, and damages the video's packets.

    Args:
        port: The camera's port.
    """

    def __init__(self, port: int) -> None:
        self._port = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self._threads: list[threading.Thread] = []
        self._sockets: list[socket.socket] = []
        self.fault: RtpFault = lambda number, packet: [bytes(packet)]
        self.url = f"rtsp://127.0.0.1:{self._listener.getsockname()[1]}/cam"
        self._start(self._accept)

    def close(self) -> None:
        for connection in (self._listener, *self._sockets):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
            connection.close()
        for thread in self._threads:
            thread.join(5)

    def _start(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        thread = threading.Thread(target=self._guard, args=(target, *arguments), name="link")
        self._threads.append(thread)
        thread.start()

    def _guard(self, target: Callable[..., None], *arguments: socket.socket) -> None:
        with contextlib.suppress(OSError, EOFError):
            target(*arguments)
        for connection in arguments:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)

    def _accept(self) -> None:
        while True:
            reader, _ = self._listener.accept()
            camera = socket.create_connection(("127.0.0.1", self._port))
            self._sockets += [reader, camera]
            self._start(self._carry_requests, reader, camera)
            self._start(self._carry_answers, camera, reader)

    def _carry_requests(self, reader: socket.socket, camera: socket.socket) -> None:
        while data := reader.recv(65536):
            camera.sendall(data)

    def _carry_answers(self, camera: socket.socket, reader: socket.socket) -> None:
        stream, number = camera.makefile("rb"), 0
        while True:
            first = _exactly(stream, 1)
            if first != b"$":  # an answer, in text
                head = first
                while not head.endswith(b"\r\n\r\n"):
                    head += _exactly(stream, 1)
                fields = dict(
                    line.lower().split(b":", 1) for line in head.split(b"\r\n") if b":" in line
                )
                reader.sendall(head + _exactly(stream, int(fields.get(b"content-length", b"0"))))
                continue
            channel, *length = _exactly(stream, 3)
            packets = [_exactly(stream, int.from_bytes(bytes(length)))]
            if channel == 0:
                packets = self.fault(number, bytearray(packets[0]))
                number += 1
            for packet in packets:
                reader.sendall(b"$" + bytes([channel]) + len(packet).to_bytes(2) + packet)


def _exactly(stream, count: int) -> bytes:
    data: bytes = stream.read(count)
    if len(data) < count:
        raise EOFError
    return data


@pytest.fixture
def faulty_link(rtsp_server) -> Iterator[FaultyLink]:
    """A link to ``rtsp_server``, without faults until ``fault`` is set."""
    link = FaultyLink(rtsp_server.port)
    yield link
    link.close()


@pytest.fixture
def publisher():
    with Publisher("tcp://127.0.0.1:0", NAMES) as publisher:
        yield publisher


@pytest.fixture
def script():
    script = Script()
    yield script
    script.close()


@pytest.fixture
def no_collector() -> Iterator[None]:
    """Turn off the cycle collector, so that only what nothing refers to is freed."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()
