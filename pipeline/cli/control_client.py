"""What ``maskcast ctl`` does: asks a running pipeline, and shows what it answers."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import zmq
from rich.table import Table
from rich.text import Text

from maskcast.engines.errors import InputError
from maskcast.pipeline.control import Answer, ListSources, RemoveSource, Request, SourceReport
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import check_endpoint

LONGEST_ANSWER = 16 << 20
"""Who answers with more bytes is no pipeline."""

_POLL_S = 0.05


class ControlClient:
    """Asks one pipeline. Not thread-safe.

    Args:
        endpoint: the pipeline's control endpoint.
        timeout_s: how long to wait for each answer.
        server_key: the publisher's ``.key`` file, where it has keys.
        client_key: your ``.key_secret`` file.

    Raises:
        InputError: the endpoint is none, or a key cannot be read.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = 5.0,
        *,
        server_key: Path | None = None,
        client_key: Path | None = None,
    ) -> None:
        self._endpoint = check_endpoint(endpoint, "tcp://127.0.0.1:5556")
        self._timeout_s = timeout_s
        self._keys: ClientKeys | None = None
        if server_key is not None and client_key is not None:
            self._keys = ClientKeys.read(server_key, client_key)
        elif server_key is not None or client_key is not None:
            raise InputError(
                "keys go together: give the server's .key and the client's .key_secret"
            )

    def ask(self, request: Request) -> Answer:
        """Send a request and return the answer to it.

        Raises:
            InputError: the pipeline refuses it, or nobody answers in time.
        """
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.MAXMSGSIZE, LONGEST_ANSWER)
            socket.set(zmq.IPV6, int("[" in self._endpoint))
            if self._keys is not None:
                socket.set(zmq.CURVE_SERVERKEY, self._keys.server)
                socket.set(zmq.CURVE_PUBLICKEY, self._keys.own.public)
                socket.set(zmq.CURVE_SECRETKEY, self._keys.own.secret)
            try:
                socket.connect(self._endpoint)
            except zmq.ZMQError as error:
                raise InputError(f"cannot connect to {self._endpoint}: {error.strerror}") from None
            socket.send(msgspec.msgpack.encode(request))
            if not socket.poll(int(self._timeout_s * 1000)):
                raise InputError(
                    f"nobody answers at {self._endpoint} within {self._timeout_s:g} s; check the "
                    "endpoint of `maskcast run --control`, and the keys if it has some"
                )
            data = socket.recv()
        try:
            answer = msgspec.msgpack.decode(data, type=Answer)
        except msgspec.MsgspecError:
            raise InputError(f"what answers at {self._endpoint} is no maskcast") from None
        if not answer.ok:
            raise InputError(answer.error)
        return answer

    def list(self) -> list[SourceReport]:
        """Return the sources and how they fare."""
        return self.ask(ListSources()).sources or []

    def remove(self, name: str) -> bool:
        """Take a source away and wait until it has gone; False where that takes too long.

        Raises:
            InputError: there is no such source, or nobody answers.
        """
        self.ask(RemoveSource(name))
        deadline_s = time.monotonic() + self._timeout_s
        while any(source.name == name for source in self.list()):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True


def source_table(sources: list[SourceReport]) -> Table:
    """Make a table with a row for each source."""
    table = Table(box=None, pad_edge=False)
    for column in ("name", "url", "state", "size", "fps", "frames", "dropped", "policy", "detail"):
        right = column in ("fps", "frames", "dropped")
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for source in sources:
        cells = (
            source.name,
            source.url,
            source.state,
            f"{source.width}x{source.height}" if source.width else "",
            f"{source.fps:.1f}",
            str(source.processed),
            str(source.dropped),
            source.policy or "",
            source.detail,
        )
        table.add_row(*map(Text, cells))
    return table
