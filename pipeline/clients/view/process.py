"""ViewProcess: the view in a process of its own, next to a run."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Self

from maskcast.engines.errors import InputError
from maskcast.pipeline.clients.view.listener import Listener
from maskcast.pipeline.packages import check_installed
from maskcast.pipeline.parent import on_parent_exit
from maskcast.pipeline.wire.endpoint import check_endpoint

TOKEN_VARIABLE = "MASKCAST_VIEW_TOKEN"
"""Environment variable of the token; a command line would be visible to other users."""

PACKAGES = ("starlette", "uvicorn", "websockets")

_LAST_FRAMES_S = 0.3
"""Delay of the end after the run's, so that browsers receive its last frames and states."""

_END_WITHIN_S = 1.5
"""Maximum time for the process to end before it is killed, seconds."""


def check_packages() -> None:
    """Check that the packages of the view extra are installed.

    Raises:
        InputError: one is missing.
    """
    check_installed(PACKAGES, "the view", "view")


def local_endpoint(endpoint: str) -> str:
    """Return the endpoint at which a program on this machine connects to a bound endpoint.

    Raises:
        InputError: the port is chosen by the system, so it is not known.
    """
    check_endpoint(endpoint, "tcp://127.0.0.1:5555")
    scheme, _, address = endpoint.partition("://")
    if scheme == "ipc":
        return endpoint
    host, _, port = address.rpartition(":")
    if port in ("*", "0"):
        raise InputError(f"--view: {endpoint} has no fixed port; name one, as in tcp://*:5555")
    host = {"*": "127.0.0.1", "0.0.0.0": "127.0.0.1", "[::]": "[::1]"}.get(host, host)
    return f"tcp://{host}:{port}"


class ViewProcess:
    """A process that serves the view of one publisher, until ``close``.

    It has a session of its own, so Ctrl-C in the terminal does not reach it. It ends by itself when
    this process ends for any reason. If it fails, the run continues.

    Args:
        endpoint: the endpoint that the publisher binds.
        http: address of the page, HOST:PORT.
        server_key: the publisher's ``.key`` file, if it uses keys.
        client_key: the ``.key_secret`` file of the view.

    Attributes:
        url: the page's URL.
        needs_token: whether browsers must send a token.

    Raises:
        InputError: a package is missing, or the page cannot be served there.
    """

    def __init__(
        self,
        endpoint: str,
        http: str,
        server_key: Path | None = None,
        client_key: Path | None = None,
    ) -> None:
        check_packages()
        endpoint = local_endpoint(endpoint)
        # Bound here, so that an address in use is reported before the run starts.
        listener = Listener(http, os.environ.get(TOKEN_VARIABLE))
        self.url = listener.url
        self.needs_token = listener.access.needs_token
        self._problem = ""
        with listener.socket as listening:
            descriptor = listening.fileno()
            keys = [str(key) for key in (server_key, client_key) if key is not None]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, endpoint, http, str(descriptor), *keys],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[descriptor],
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_errors, name="view", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def note(self) -> str:
        """Return a line with the page's URL, or why the process has ended."""
        if self._process.poll() is None:
            return f"view: {self.url}"
        return f"view: ended unexpectedly: {self._problem or self._process.returncode}"

    def close(self) -> None:
        """End the process."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        try:
            self._process.wait(_END_WITHIN_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._reader.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read_errors(self) -> None:
        assert self._process.stderr is not None
        with self._process.stderr as lines:
            for line in lines:
                self._problem = line.decode(errors="replace").strip() or self._problem


def main(
    endpoint: str,
    http: str,
    descriptor: str,
    server_key: str | None = None,
    client_key: str | None = None,
) -> None:
    """Serve on a socket that this process inherited, until standard input is closed."""
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    with socket.socket(fileno=int(descriptor)) as listening:
        listener = Listener(http, os.environ.get(TOKEN_VARIABLE), listening)
        keys = [None if key is None else Path(key) for key in (server_key, client_key)]
        server = ViewServer(subscribe_for_view(endpoint, *keys), listener)

        def stop_with_parent() -> None:
            time.sleep(_LAST_FRAMES_S)
            server.stop()

        on_parent_exit(stop_with_parent)
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
