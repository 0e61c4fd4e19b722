"""Measure how quickly changed rights and revoked keys take effect in each place that checks them.

Run: ``python -m benchmarks.rights [--rounds 10] [--places publisher gateway control view]``.

A publisher sends two sources at 50 frames per second each, over TCP on this machine. In each round
one client's rights file is replaced, then its key is deleted, both in the file system, as a user
does; nothing is restarted. Reported is the time from the change to:

- changed: the last frame of the source that the client may no longer receive;
- granted: the first frame of the source that it may receive now;
- revoked: the last frame after its key was deleted.

In ``control`` a frame is an answer that is not a refusal. In ``view`` the client whose rights
change is the view, and frames are counted in a browser's websocket.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import statistics
import struct
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import av
import numpy as np
from rich.console import Console
from rich.table import Table

from maskcast.engines.errors import InputError
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.cluster.gateway import Gateway
from maskcast.pipeline.configuration.config import ControlConfig
from maskcast.pipeline.control.client import ControlClient
from maskcast.pipeline.control.server import ControlServer
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.log import configure
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.subscriber.subscribe import subscribe
from maskcast.pipeline.wire.curve import ClientKeys, new_keys
from maskcast.pipeline.wire.rights import ClientRights, write_rights
from maskcast.pipeline.wire.server_keys import ServerKeys

DOOR, YARD = "door", "yard"
INTERVAL_S = 0.02
QUIET_S = 2.0
"""After this time without a frame, no more are expected."""

TIMEOUT_S = 60.0
DECODED = av.VideoFrame(64, 48)
NOTHING = Instances(
    64,
    48,
    np.zeros((0, 4), np.float32),
    np.zeros(0, np.float32),
    np.zeros(0, np.int32),
    np.zeros((0, 28, 28), np.uint8),
)

Times = dict[str, float]
"""Time of the last frame of each source, monotonic seconds."""


class Keys:
    """Key files in a folder: the server's, and those of one client and of a worker."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("clients", "workers"):
            (folder / name).mkdir()
        new_keys(folder / "server")
        new_keys(folder / "workers/worker")
        self.key, self.secret = new_keys(folder / "clients/client")
        self._content = self.key.read_bytes()
        self.allow(DOOR)

    def allow(self, *sources: str) -> None:
        """Grant the client these sources, and ``control`` together with DOOR."""
        write_rights(self.key, ClientRights(sources=sources, control=DOOR in sources))

    def revoke(self) -> None:
        """Delete the client's key."""
        self.key.unlink()

    def restore(self) -> None:
        """Allow the client again."""
        self.allow(DOOR)
        self.key.write_bytes(self._content)

    def read(self, folder: str, purpose: Any) -> ServerKeys:
        """Read the server's keys, with the clients of one folder."""
        return ServerKeys.read(self.folder / "server.key_secret", self.folder / folder, purpose)


@contextmanager
def publishing(**options: Any) -> Iterator[Publisher]:
    """Publish both sources until the end."""
    opened, over = threading.Event(), threading.Event()
    made: list[Publisher] = []

    def publish() -> None:
        with Publisher(**options, label_names=("background", "person")) as publisher:
            made.append(publisher)
            opened.set()
            index = 0
            while not over.wait(INTERVAL_S):
                for source in (DOOR, YARD):
                    frame = Frame(source, index, index * INTERVAL_S, time.time_ns(), DECODED)
                    publisher.publish(frame, NOTHING)
                index += 1

    thread = threading.Thread(target=publish, name="publish")
    thread.start()
    opened.wait(TIMEOUT_S)
    try:
        yield made[0]
    finally:
        over.set()
        thread.join()


@contextmanager
def receiving(endpoint: str, keys: Keys, last: Times) -> Iterator[None]:
    """Record the times of a subscriber's frames."""
    subscription = subscribe(
        endpoint,
        policy="all",
        timeout_s=600,
        until_ended=False,
        server_key=keys.folder / "server.key",
        client_key=keys.secret,
    )

    def read() -> None:
        for frame in subscription:
            last[frame.source] = time.monotonic()

    with subscription:
        thread = threading.Thread(target=read, name="receive")
        thread.start()
        yield
    thread.join()


@contextmanager
def at_publisher(keys: Keys, last: Times) -> Iterator[None]:
    """Subscribe to the publisher."""
    own = keys.read("clients", "subscribe")
    with (
        publishing(endpoint="tcp://127.0.0.1:0", keys=own) as publisher,
        receiving(publisher.endpoint, keys, last),
    ):
        yield


@contextmanager
def at_gateway(keys: Keys, last: Times) -> Iterator[None]:
    """Subscribe to a gateway."""
    worker = ClientKeys.read(keys.folder / "server.key", keys.folder / "workers/worker.key_secret")
    with (
        Gateway(
            "tcp://127.0.0.1:0",
            "tcp://127.0.0.1:0",
            keys=keys.read("clients", "subscribe"),
            source_keys=keys.read("workers", "publish"),
        ) as gateway,
        publishing(endpoint="", gateways=[gateway.sources_endpoint], gateway_keys=worker),
        receiving(gateway.endpoint, keys, last),
    ):
        yield


class _NoSources:
    """A pipeline without sources, to be controlled."""

    def reports(self) -> list[Any]:
        return []

    def cluster(self) -> None:
        return None


@contextmanager
def at_control(keys: Keys, last: Times) -> Iterator[None]:
    """Send requests to a control server."""
    endpoint = f"tcp://127.0.0.1:{random.randint(20_000, 30_000)}"
    config = ControlConfig(endpoint=endpoint, allowed_clients=str(keys.folder / "clients"))
    faults: list[BaseException] = []
    stub: Any = _NoSources()
    server = ControlServer(config, str(keys.folder / "server.key_secret"), stub, faults.append)
    server.start()
    over = threading.Event()

    def ask() -> None:
        client = ControlClient(
            endpoint, 0.3, server_key=keys.folder / "server.key", client_key=keys.secret
        )
        while not over.wait(INTERVAL_S):
            try:
                client.list()
            except InputError:
                last[YARD] = time.monotonic()  # refused, or not answered
            else:
                last[DOOR] = time.monotonic()

    thread = threading.Thread(target=ask, name="ask")
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        server.close()


@contextmanager
def at_view(keys: Keys, last: Times) -> Iterator[None]:
    """Receive from the view as a browser does."""
    from websockets.exceptions import ConnectionClosed
    from websockets.sync.client import connect

    from maskcast.pipeline.clients.view.listener import Listener
    from maskcast.pipeline.clients.view.server import ViewServer, subscribe_for_view

    own = keys.read("clients", "subscribe")
    with publishing(endpoint="tcp://127.0.0.1:0", keys=own) as publisher:
        listener = Listener("127.0.0.1:0", None)
        subscription = subscribe_for_view(
            publisher.endpoint, keys.folder / "server.key", keys.secret
        )
        view = ViewServer(subscription, listener)
        serving = threading.Thread(target=view.run, name="view")
        serving.start()
        url = listener.url.replace("http:", "ws:") + "stream"
        with connect(url, max_size=None) as socket:
            socket.send("")

            def read() -> None:
                try:
                    for message in socket:
                        if isinstance(message, bytes):
                            (size,) = struct.unpack_from("<I", message, 8)
                            source = json.loads(message[16 : 16 + size])["source"]
                            last[source] = time.monotonic()
                            socket.send(source)
                except ConnectionClosed:
                    pass

            reading = threading.Thread(target=read, name="browser")
            reading.start()
            yield
        reading.join()
        view.stop()
        serving.join()


PLACES = {
    "publisher": at_publisher,
    "gateway": at_gateway,
    "control": at_control,
    "view": at_view,
}


def wait_until(condition: Callable[[], bool]) -> None:
    """Wait for a condition; exit if it takes too long."""
    deadline_s = time.monotonic() + TIMEOUT_S
    while not condition():
        if time.monotonic() > deadline_s:
            raise SystemExit(f"a condition did not hold within {TIMEOUT_S:.0f} s")
        time.sleep(0.001)


def measure(place: str, rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round, by what was measured."""
    seconds: dict[str, list[float]] = {"changed": [], "granted": [], "revoked": []}
    last: Times = {}
    with ExitStack() as closing:
        keys = Keys(Path(closing.enter_context(tempfile.TemporaryDirectory())))
        closing.enter_context(PLACES[place](keys, last))

        def wait_for(source: str) -> float:
            """Return the time from now to the next frame of a source."""
            began_s = time.monotonic()
            wait_until(lambda: last.get(source, 0.0) > began_s)
            return time.monotonic() - began_s

        def wait_for_end(source: str) -> float:
            """Return the time from now to the last frame of a source."""
            began_s = time.monotonic()
            wait_until(lambda: time.monotonic() - max(last.get(source, 0.0), began_s) > QUIET_S)
            return max(last.get(source, 0.0) - began_s, 0.0)

        for _ in range(rounds):
            wait_for(DOOR)
            time.sleep(random.random())  # the files are read at intervals
            keys.allow(YARD)
            ended: list[float] = []
            waiting = threading.Thread(target=lambda: ended.append(wait_for_end(DOOR)))  # noqa: B023
            waiting.start()
            seconds["granted"].append(wait_for(YARD))
            waiting.join()
            seconds["changed"] += ended
            keys.allow(DOOR)
            wait_for(DOOR)
            time.sleep(random.random())
            keys.revoke()
            seconds["revoked"].append(wait_for_end(DOOR))
            keys.restore()
    return seconds


def main() -> None:
    """Measure, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--places", nargs="+", choices=[*PLACES], default=[*PLACES])
    options = parser.parse_args()
    configure("error")
    print(f"load average {os.getloadavg()[0]:.1f} on {os.cpu_count()} cores")
    table = Table("place", *(f"{what}: median, longest s" for what in ("changed", "granted")))
    table.add_column("revoked: median, longest s")
    for place in options.places:
        found = measure(place, options.rounds)
        table.add_row(
            place, *(f"{statistics.median(one):.2f}, {max(one):.2f}" for one in found.values())
        )
    Console().print(table)


if __name__ == "__main__":
    main()
