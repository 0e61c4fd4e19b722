"""A publisher, and the server of the page that shows its sources."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from studio import Studio


@pytest.fixture(scope="module")
def studio() -> Iterator[Studio]:
    publisher = Studio()
    yield publisher
    publisher.close()


Serve = Callable[..., str]


@pytest.fixture(scope="module")
def serve() -> Iterator[Serve]:
    """Serve the page of an endpoint: ``serve(endpoint, token=None) -> url``."""
    pytest.importorskip("starlette")
    from maskcast.pipeline.clients.view.listener import Listener
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    running = []

    def start(endpoint: str, token: str | None = None, **keys: Path) -> str:
        listener = Listener("127.0.0.1:0", token)
        server = ViewServer(subscribe_for_view(endpoint, **keys), listener)
        thread = threading.Thread(target=server.run, name="view server")
        thread.start()
        running.append((server, thread))
        return listener.url

    yield start
    for server, _ in running:
        server.stop()
    for _, thread in running:
        thread.join(60)
        assert not thread.is_alive()
