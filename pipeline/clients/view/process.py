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
from maskcast.pipeline.wire.endpoint import check_endpoint

TOKEN_VARIABLE = "MASKCAST_VIEW_TOKEN"
"""Environment variable with the token, which would be visible in a command line."""

PACKAGES = ("starlette", "uvicorn", "websockets")

_LAST_FRAMES_S = 0.3
"""When the run has ended, the browsers still receive its last states."""
_END_WITHIN_S = 1.5


def check_packages() -> None:
    """Check that the packages of the view extra are installed.

    Raises:
        InputError: one is missing.
    """
    check_installed(PACKAGES, "the view", "view")


def local_endpoint(endpoint: str) -> str:
    """Return where a program of this machine connects to a bound endpoint.

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

    It is not of the terminal's process group, so Ctrl-C does not reach it; and it ends by itself
    when this process has ended in any way. If it fails, the run goes on.

    Args:
        endpoint: the endpoint that the publisher binds.
        http: where to serve the page, HOST:PORT.
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
            number = listening.fileno()
            keys = [str(key) for key in (server_key, client_key) if key is not None]
            self._process = subprocess.Popen(
                [sys.executable, "-m", __name__, endpoint, http, str(number), *keys],
                stdin=subprocess.PIPE,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                pass_fds=[number],
                start_new_session=True,
            )
        self._reader = threading.Thread(target=self._read_errors, name="view", daemon=True)
        self._reader.start()

    @property
    def pid(self) -> int:
        """The process's id."""
        return self._process.pid

    def note(self) -> str:
        """Return one line for people: where the page is, or why it is gone."""
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
    number: str,
    server_key: str | None = None,
    client_key: str | None = None,
) -> None:
    """Serve on a socket that this process inherited, until standard input is closed."""
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    with socket.socket(fileno=int(number)) as listening:
        listener = Listener(http, os.environ.get(TOKEN_VARIABLE), listening)
        keys = [None if key is None else Path(key) for key in (server_key, client_key)]
        server = ViewServer(subscribe_for_view(endpoint, *keys), listener)

        def stop_with_parent() -> None:
            sys.stdin.buffer.read()
            time.sleep(_LAST_FRAMES_S)
            server.stop()

        threading.Thread(target=stop_with_parent, name="parent", daemon=True).start()
        server.run()


if __name__ == "__main__":
    main(*sys.argv[1:])
