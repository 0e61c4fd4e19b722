"""Control: a socket for adding and removing sources while the pipeline runs."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.configuration.config import Config, ConfinedSourceConfig, ControlConfig
from maskcast.pipeline.configuration.config_file import make_source
from maskcast.pipeline.control.allow_list import REMOTE_DEFAULT, AllowList
from maskcast.pipeline.control.controllable import Controllable
from maskcast.pipeline.control.messages import (
    AddSource,
    Answer,
    ListSources,
    MoveSource,
    RemoveSource,
    Request,
    decode_request,
)
from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.url import shorten
from maskcast.pipeline.wire.endpoint import (
    bind,
    check_endpoint,
    is_loopback,
    is_public,
    remove_socket_file,
    set_common_options,
)
from maskcast.pipeline.wire.rights import EVERYTHING, ClientRights
from maskcast.pipeline.wire.server_keys import ServerKeys

MAX_PART_BYTES = 1 << 20
"""A client that sends a longer part is disconnected."""

LINGER_MS = 200

_logger = logging.getLogger(__name__)


class ControlServer:
    """Answers requests one by one, on a thread of its own, which owns the socket.

    Every request is answered, a malformed one with an error. No request waits for a source: sources
    are opened and closed on other threads.

    Args:
        config: the endpoint, and who may do what.
        secret_key: the server's ``.key_secret`` file; needed if ``allowed_clients`` is set.
        pipeline: the pipeline to control.
        on_error: called with the error if the endpoint cannot be bound, or if the server has ended
            because of an unexpected error.

    Raises:
        InputError: a rule of ``allow`` is invalid, or there is no secret key.
    """

    def __init__(
        self,
        config: ControlConfig,
        secret_key: str | None,
        pipeline: Controllable,
        on_error: Callable[[BaseException], None],
    ) -> None:
        self._endpoint = config.endpoint
        self._allowed_clients = config.allowed_clients
        self._secret_key = secret_key
        self._allowed_sources = check_control(config, secret_key)
        self._pipeline = pipeline
        self._on_error = on_error
        self._context = zmq.Context()
        self._closing = threading.Event()
        self._guard: PeerGuard | None = None
        self._thread = threading.Thread(target=self._run, name="control", daemon=True)

    def start(self) -> None:
        """Start serving in the background."""
        self._thread.start()

    def close(self) -> None:
        """Stop serving and free the endpoint."""
        self._closing.set()
        self._context.term()
        if self._thread.ident is not None:
            self._thread.join()
        if self._guard is not None:
            self._guard.join()

    def _run(self) -> None:
        try:
            with self._context.socket(zmq.REP) as socket:
                bound = self._open(socket)
                try:
                    while True:
                        request = _receive(socket)
                        socket.send(self.answer(request.bytes, self._rights(request)))
                finally:
                    remove_socket_file(bound)
        except BaseException as error:
            # Closing makes every call on the socket fail, including those of ``_open``.
            if not self._closing.is_set():
                self._on_error(error)

    def _open(self, socket: zmq.Socket[bytes]) -> str:
        set_common_options(socket, linger_ms=LINGER_MS, max_part_bytes=MAX_PART_BYTES)
        if self._allowed_clients is not None and self._secret_key is not None:
            keys = ServerKeys.read(self._secret_key, self._allowed_clients, "control")
            self._guard = PeerGuard(socket, keys)
        bound = bind(socket, self._endpoint, "be controlled")
        if bound.startswith("ipc://"):
            Path(bound.removeprefix("ipc://")).chmod(0o600)
        elif self._allowed_clients is None and not is_loopback(bound):
            raise _too_open(self._endpoint)
        _logger.info("control_open", extra=fields(endpoint=bound))
        return bound

    def answer(self, request: bytes, rights: ClientRights | None = EVERYTHING) -> bytes:
        """Execute a request and return the answer, both as msgpack maps.

        Args:
            request: the request.
            rights: the client's rights; None if its key is not allowed any more.
        """
        try:
            if rights is None or not rights.control:
                raise InputError("this key may not control; see maskcast keys allow --control")
            answer = self._execute(decode_request(request), rights)
        except InputError as error:
            answer = Answer(ok=False, error=shorten(str(error)))
            _logger.info("control_refused", extra=fields(reason=answer.error))
        return msgspec.msgpack.encode(answer)

    def _rights(self, request: zmq.Frame) -> ClientRights | None:
        """Return the rights of the client that sent a request."""
        if self._allowed_clients is None or self._guard is None:
            return EVERYTHING
        return self._guard.rights(str(request.get("User-Id")).encode())

    def _execute(self, request: Request, rights: ClientRights) -> Answer:
        match request:
            case AddSource(source=raw):
                source = make_source(raw)
                _check_right(rights, source.name)
                self._allowed_sources.check(source.url)
                if self._allowed_sources.is_confined(source.url):
                    source = ConfinedSourceConfig(**msgspec.structs.asdict(source))
                self._pipeline.add(source)
            case RemoveSource(name=name):
                _check_right(rights, name)
                self._pipeline.remove(name)
            case MoveSource(name=name, node=node):
                _check_right(rights, name)
                self._pipeline.move(name, node)
            case ListSources():
                reports = self._pipeline.reports()
                return Answer(
                    ok=True,
                    sources=[report for report in reports if rights.allows(report.name)],
                    cluster=self._pipeline.cluster(),
                )
        return Answer(ok=True)


def control_config(control: ControlConfig | str) -> ControlConfig:
    """Return the ``control`` section, which may be given as the endpoint alone."""
    return ControlConfig(endpoint=control) if isinstance(control, str) else control


def secret_key_of(config: Config) -> str | None:
    """Return the publisher's secret key file, which the server uses too; None without one."""
    publish = config.publish
    return publish.curve.secret_key if publish is not None and publish.curve is not None else None


def check_control(config: ControlConfig, secret_key: str | None) -> AllowList:
    """Check the configuration without opening a socket, and return the rules for sources.

    Whether a host name is a loopback address is checked later, when it is bound.

    Raises:
        InputError: the endpoint is malformed or open to others, a key cannot be read, or a rule of
            ``allow`` is invalid.
    """
    check_endpoint(config.endpoint, "tcp://127.0.0.1:5556")
    if config.allowed_clients is not None:
        if secret_key is None:
            raise InputError(
                "control.allowed_clients: there is no key for the server; set "
                "publish.curve.secret_key, see maskcast keys new"
            )
        ServerKeys.read(secret_key, config.allowed_clients)
    elif is_public(config.endpoint):
        raise _too_open(config.endpoint)
    return AllowList(_rules(config))


def _too_open(endpoint: str) -> InputError:
    return InputError(
        f"{endpoint}: anyone on the network could control this; use "
        "ipc:///path/to/socket or tcp://127.0.0.1:<port>, or set control.allowed_clients"
    )


def _receive(socket: zmq.Socket[bytes]) -> zmq.Frame:
    """Return a request's first part; further parts are ignored."""
    return socket.recv_multipart(copy=False)[0]


def _check_right(rights: ClientRights, name: str | None) -> None:
    """Raise InputError if a client may not control a source, whether the source exists or not."""
    if name is not None and not rights.allows(name):
        raise InputError(f"{name}: this key may not control this source; see maskcast keys allow")


def _rules(config: ControlConfig) -> Sequence[str] | None:
    """Return the rules for sources: only the owner of an ipc socket may add any by default."""
    if config.allow is not None:
        return config.allow
    is_owner = config.endpoint.startswith("ipc://") and config.allowed_clients is None
    return None if is_owner else REMOTE_DEFAULT
