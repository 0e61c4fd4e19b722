"""ControlClient: adds, removes and lists the sources of a running pipeline."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.control.messages import (
    NOT_MOVED,
    AddSource,
    Answer,
    ClusterReport,
    ListSources,
    MoveSource,
    Placement,
    RemoveSource,
    Request,
    SourceReport,
)
from maskcast.pipeline.sources.state import FINISHED, SourceState
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import check_endpoint, missing_socket, reason

MAX_ANSWER_BYTES = 16 << 20
"""Maximum size of an answer, bytes."""

_POLL_S = 0.05


class ControlClient:
    """Sends requests to one pipeline. Not thread-safe.

    Args:
        endpoint: the pipeline's control endpoint.
        timeout_s: seconds to wait for each answer.
        server_key: the server's ``.key`` file, if it uses keys.
        client_key: your ``.key_secret`` file.
        command: the command that serves the endpoint, for error messages.

    Raises:
        InputError: the endpoint is invalid, or a key cannot be read.
    """

    def __init__(
        self,
        endpoint: str,
        timeout_s: float = 5.0,
        *,
        server_key: Path | None = None,
        client_key: Path | None = None,
        command: str = "maskcast run --control ENDPOINT",
    ) -> None:
        self._command = command
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
            InputError: the pipeline refuses the request, or does not answer in time.
        """
        with zmq.Context() as context, context.socket(zmq.REQ) as socket:
            socket.set(zmq.LINGER, 0)
            socket.set(zmq.MAXMSGSIZE, MAX_ANSWER_BYTES)
            socket.set(zmq.IPV6, int("[" in self._endpoint))
            if self._keys is not None:
                self._keys.apply(socket)
            try:
                socket.connect(self._endpoint)
            except zmq.ZMQError as error:
                raise InputError(f"cannot connect to {self._endpoint}: {reason(error)}") from None
            socket.send(msgspec.msgpack.encode(request))
            if not socket.poll(int(self._timeout_s * 1000)):
                waited = f"no answer from {self._endpoint} within {self._timeout_s:g} s"
                if problem := missing_socket(self._endpoint):
                    command = self._command.replace("ENDPOINT", self._endpoint)
                    raise InputError(f"{waited}: {problem}; start `{command}`")
                raise InputError(
                    f"{waited}; check the endpoint of `{self._command}`, and the keys if it uses "
                    "them"
                )
            data = socket.recv()
        try:
            answer = msgspec.msgpack.decode(data, type=Answer)
        except msgspec.MsgspecError:
            raise InputError(
                f"not a maskcast pipeline at {self._endpoint}: check the endpoint"
            ) from None
        if not answer.ok:
            raise InputError(answer.error)
        return answer

    def status(self) -> tuple[ClusterReport, list[SourceReport]]:
        """Return the nodes and the gateway of a cluster, and its sources.

        Raises:
            InputError: it is a single pipeline, or it does not answer.
        """
        answer = self.ask(ListSources())
        if answer.cluster is None:
            raise InputError(
                f"{self._endpoint}: a single pipeline, not a cluster; use maskcast ctl"
            )
        return answer.cluster, answer.sources or []

    def list(self) -> list[SourceReport]:
        """Return the sources with their states and figures."""
        return self.ask(ListSources()).sources or []

    def _find(self, name: str) -> SourceReport | None:
        return next((source for source in self.list() if source.name == name), None)

    def move(self, name: str, node: str) -> SourceReport:
        """Move a source and wait until it runs elsewhere; return its report.

        Raises:
            InputError: it cannot be moved there, or that takes longer than ``timeout_s``.
        """
        before = self._find(name)
        self.ask(MoveSource(name, node))
        deadline_s = time.monotonic() + self._timeout_s
        while time.monotonic() < deadline_s:
            found = self._find(name)
            if found is None or before is None:
                break
            if found.detail.startswith(NOT_MOVED):
                raise InputError(f"{name}: {found.detail}")
            if found.pid != before.pid and found.placement is Placement.RUNNING:
                return found
            time.sleep(_POLL_S)
        raise InputError(f"{name}: not moved within {self._timeout_s:g} s; check its status later")

    def add(self, source: Mapping[str, Any]) -> SourceReport | None:
        """Add a source and wait until it has been opened, or the first attempt has failed.

        Args:
            source: the keys of a source in the configuration; ``name`` and ``url`` are needed.

        Returns:
            Its report; still ``connecting`` after ``timeout_s``. None if it was removed meanwhile.

        Raises:
            InputError: the pipeline refuses the source, or does not answer in time.
        """
        self.ask(AddSource(dict(source)))
        deadline_s = time.monotonic() + self._timeout_s
        while True:
            found = self._find(source["name"])
            is_opening = (
                found is not None
                and found.state is SourceState.CONNECTING
                and found.placement not in (Placement.UNPLACED, Placement.SET_ASIDE)
            )
            if not is_opening or time.monotonic() >= deadline_s:
                return found
            time.sleep(_POLL_S)

    def remove(self, name: str) -> bool:
        """Remove a source and wait until it is gone; return False after ``timeout_s``.

        Raises:
            InputError: there is no such source, or the pipeline does not answer.
        """
        self.ask(RemoveSource(name))
        deadline_s = time.monotonic() + self._timeout_s
        while any(source.name == name for source in self.list()):
            if time.monotonic() >= deadline_s:
                return False
            time.sleep(_POLL_S)
        return True


def describe_added(found: SourceReport) -> str:
    """Describe the state of a source that was added, in one line.

    Raises:
        InputError: it has failed.
    """
    size = f" {found.width}x{found.height}" if found.width else ""
    detail = f": {found.detail}" if found.detail else ""
    if found.placement is Placement.UNPLACED:
        return f"{found.name}: added, but not placed on a node yet{detail}"
    has_failed = found.state is SourceState.ENDED and found.detail not in FINISHED
    if has_failed or found.placement is Placement.SET_ASIDE:
        raise InputError(
            f"{found.name}: added, but it has failed, and keeps its name until you remove it"
            f"{detail}"
        )
    match found.state:
        case SourceState.CONNECTING:
            return f"{found.name}: added, not connected yet; list the sources again later"
        case SourceState.RECONNECTING:
            return f"{found.name}: added, but not reached yet; it is retried{detail}"
    return f"{found.name}: added, {found.state}{size}{detail}"


def source_lines(sources: Sequence[SourceReport]) -> Iterator[str]:
    """Yield a table of sources, two or three lines each; URLs are never broken."""
    head = ("name", "state", "fps", "processed", "skipped", "dropped")
    rows: list[tuple[str, ...]] = [head]
    rows += [
        (
            one.name,
            one.state,
            f"{one.fps:.1f}",
            *map(str, (one.processed, one.skipped, one.dropped)),
        )
        for one in sources
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for source, row in zip((None, *sources), rows, strict=True):
        cells = [
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        yield "  ".join(cells)
        if source is not None:
            size = f"{source.width}x{source.height}" if source.width else None
            yield "  " + ", ".join(filter(None, (source.url, size, source.policy)))
            if source.detail:
                yield f"  {source.detail}"
