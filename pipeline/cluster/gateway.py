"""Gateway: receives from many publishers and passes their messages on at one endpoint."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from concurrent.futures import Future
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Self

import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.cluster.inlet import BoundInlet, ConnectedInlet, Inlet
from maskcast.pipeline.monitor.health import Health
from maskcast.pipeline.publisher.outlet import BoundOutlet
from maskcast.pipeline.subscriber.losses import LossTracker
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.kept import KeptEvents
from maskcast.pipeline.wire.message import EventHeader, WireError, decode_header, topic
from maskcast.pipeline.wire.server_keys import ServerKeys

MAX_SOURCES = 16_384
"""Number of sources whose sequence numbers and kept events are remembered, the most recent ones."""

BATCH = 100
"""Maximum number of messages that are taken from one connection before the next one."""

POLL_S = 0.1
"""Interval at which the stop order and the connections are checked while nothing arrives."""

ANSWER_S = 0.005
"""Maximum time spent on new subscriptions between two batches."""

FOLLOW_S = 0.05
"""Interval at which changed subscriptions are passed on to publishers."""

DRAIN_S = 0.5
"""Maximum time for which ``stop`` passes on what publishers have sent before."""

LINGER_MS = 200

STUCK_AFTER_S = 10.0
"""A gateway whose thread has worked on one batch for this long is not healthy."""


@dataclass(frozen=True, slots=True)
class GatewayStats:
    """Figures of a gateway since its start.

    Attributes:
        messages: number of messages passed on, frames and events.
        bytes: their total size.
        lost: number of subscribed frames that did not arrive, by the sequence numbers.
        duplicate: number of frames that arrived twice, and were passed on once.
        malformed: number of messages that could not be read or were too long, and were not passed
            on.
        publishers: number of connected publishers.
        subscribers: number of connected subscribers.
        sources: the last known state of each source: ``connecting``, ``streaming``, ``stalled``,
            ``reconnecting`` or ``ended``.
        problems: why an upstream endpoint is not connected, one line each.
    """

    messages: int
    bytes: int
    lost: int
    duplicate: int
    malformed: int
    publishers: int
    subscribers: int
    sources: dict[str, str]
    problems: tuple[str, ...]


class Gateway:
    """Passes messages on unchanged, with the ``publisher`` and ``seq`` that they have.

    Publishers connect to ``sources`` (``publish.gateways`` in their configuration); the gateway
    connects to publishers and gateways in ``upstream``. To a subscriber, the gateway looks like a
    publisher: the subscriber can count every message that was lost on the way, and sees a source
    that moves to another publisher as a restart. New subscribers receive the label names, the size
    and the state of each source at once.

    The gateway requests from publishers the frames to which there is a subscription, and all frames
    from ``upstream``. It drops messages for subscribers that are too slow. A message that arrives
    twice, for instance from two upstream gateways, is passed on once.

    Args:
        publish: the endpoint to bind for subscribers, "tcp://*:5555".
        sources: the endpoint to bind for publishers, "tcp://*:5556".
        upstream: endpoints of publishers and gateways to subscribe to.
        keys: encrypt connections of subscribers, and admit only those whose keys are allowed.
        source_keys: the same for publishers that connect.
        upstream_keys: keys for the encrypted connections to ``upstream``.
        high_water_mark: messages queued for a slow subscriber, and from each publisher.

    Attributes:
        endpoint: the bound endpoint for subscribers, with the actual port; "" before ``start``.
        sources_endpoint: the bound endpoint for publishers; "" without one.

    Raises:
        InputError: there is neither ``sources`` nor ``upstream``.
    """

    def __init__(
        self,
        publish: str,
        sources: str | None = None,
        *,
        upstream: Sequence[str] = (),
        keys: ServerKeys | None = None,
        source_keys: ServerKeys | None = None,
        upstream_keys: ClientKeys | None = None,
        high_water_mark: int = 1000,
    ) -> None:
        if sources is None and not upstream:
            raise InputError("nothing to pass on: give --sources ENDPOINT or --upstream ENDPOINT")
        self.endpoint = self.sources_endpoint = ""
        self._publish, self._sources, self._upstream = publish, sources, tuple(upstream)
        self._keys, self._source_keys, self._upstream_keys = keys, source_keys, upstream_keys
        self._high_water_mark = high_water_mark
        self._stopping = threading.Event()
        self._opened: Future[None] = Future()
        self._fault: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="gateway", daemon=True)
        self._lock = threading.Lock()  # guards everything below
        self._losses = LossTracker(MAX_SOURCES)
        self._kept = KeptEvents(MAX_SOURCES)
        self._messages = self._bytes = 0
        self._inlets: list[Inlet] = []
        self._outlet: BoundOutlet | None = None
        self._followed: set[bytes] = set()
        self._follow_at_s = 0.0
        self._polled_s = time.monotonic()

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def start(self) -> None:
        """Bind, connect, and pass messages on in the background.

        Raises:
            InputError: an endpoint cannot be bound or is invalid.
            RuntimeError: it was started before.
        """
        self._thread.start()
        self._opened.result()

    def stop(self) -> None:
        """Pass on and send what has been received, for 0.7 s at most, and free the endpoints.

        Stopping twice is safe.
        """
        self._stopping.set()
        self.wait()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Wait until the gateway has stopped, for at most ``timeout_s``; return whether it has.

        Raises:
            Exception: the error that ended it.
        """
        self._thread.join(timeout_s)
        if self._fault is not None:
            raise self._fault
        return not self._thread.is_alive()

    def stats(self) -> GatewayStats:
        """Return the current figures. May be called from any thread."""
        with self._lock:
            tally = self._losses.tally
            return GatewayStats(
                messages=self._messages,
                bytes=self._bytes,
                lost=tally.lost,
                duplicate=tally.duplicate,
                malformed=tally.malformed,
                publishers=sum(inlet.peers for inlet in self._inlets),
                subscribers=0 if self._outlet is None else self._outlet.peers,
                sources=self._kept.states(),
                problems=tuple(
                    f"{inlet.endpoint}: {inlet.problem}" for inlet in self._inlets if inlet.problem
                ),
            )

    def health(self) -> Health:
        """Check whether the gateway passes messages on and its upstream endpoints are connected."""
        stats = self.stats()
        problems = list(stats.problems)
        if not self._thread.is_alive():
            problems.append("the gateway has stopped")
        elif time.monotonic() - self._polled_s > STUCK_AFTER_S:
            problems.append(f"the gateway has been stuck for more than {STUCK_AFTER_S:.0f} s")
        return Health(not problems, problems, stats.sources)

    def _run(self) -> None:
        try:
            with ExitStack() as closing:
                try:
                    inlets, outlet = self._open(closing)
                except BaseException as error:
                    self._opened.set_exception(error)
                    return
                self._opened.set_result(None)
                while not self._stopping.is_set():
                    self._polled_s = time.monotonic()
                    self._wait_for_input(inlets, outlet)
                    for inlet in inlets:
                        self._pass_on(inlet, outlet)
                    outlet.answer(ANSWER_S, self._kept.messages)
                    if time.monotonic() >= self._follow_at_s:
                        self._follow(inlets, outlet)
                self._drain(inlets, outlet)
        except BaseException as error:
            self._fault = error

    def _open(self, closing: ExitStack) -> tuple[list[Inlet], BoundOutlet]:
        inlets: list[Inlet] = []
        if self._sources is not None:
            bound = BoundInlet(self._sources, self._source_keys, self._high_water_mark)
            closing.callback(bound.close)
            self.sources_endpoint = bound.endpoint
            inlets.append(bound)
        context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
        closing.callback(context.term)
        for endpoint in self._upstream:
            connected = ConnectedInlet(
                context, endpoint, self._upstream_keys, self._high_water_mark
            )
            closing.callback(connected.close)
            inlets.append(connected)
        outlet = BoundOutlet(
            self._publish,
            high_water_mark=self._high_water_mark,
            keys=self._keys,
            lossless=False,
            linger_ms=LINGER_MS,
        )
        closing.callback(outlet.close)
        self.endpoint = outlet.endpoint
        with self._lock:
            self._inlets, self._outlet = inlets, outlet
        return inlets, outlet

    def _wait_for_input(self, inlets: Sequence[Inlet], outlet: BoundOutlet) -> None:
        poller = zmq.Poller()
        for inlet in inlets:
            for socket in inlet.ready_sockets():
                poller.register(socket, zmq.POLLIN)
        for socket in outlet.sockets:
            poller.register(socket, zmq.POLLIN)
        poller.poll(1 if outlet.has_backlog else int(POLL_S * 1000))

    def _drain(self, inlets: Sequence[Inlet], outlet: BoundOutlet) -> None:
        """Pass on what arrives until there is a pause: the last messages of ended publishers."""
        now_s = received_s = time.monotonic()
        end_s = now_s + DRAIN_S
        while now_s < min(end_s, received_s + POLL_S):
            self._wait_for_input(inlets, outlet)
            passed_on = [self._pass_on(inlet, outlet) for inlet in inlets]
            now_s = time.monotonic()
            if any(passed_on):
                received_s = now_s

    def _pass_on(self, inlet: Inlet, outlet: BoundOutlet) -> bool:
        """Pass on what has arrived on one connection, at most one batch; return whether any has."""
        for taken in range(BATCH):
            parts, size = inlet.receive()
            if parts is None and not size:
                return taken > 0
            with self._lock:
                if parts is None or not self._count(parts, outlet):
                    self._losses.tally.malformed += parts is None
                    continue
                self._messages += 1
                self._bytes += size
            outlet.send(parts)
        return True

    def _follow(self, inlets: Sequence[Inlet], outlet: BoundOutlet) -> None:
        """Pass changed subscriptions on to the publishers."""
        self._follow_at_s = time.monotonic() + FOLLOW_S
        prefixes = outlet.prefixes()
        if prefixes == self._followed:
            return
        followed = [inlet.follow(prefixes) for inlet in inlets]
        if all(followed):
            cancelled = tuple(self._followed - prefixes)
            self._followed = prefixes
            if cancelled:  # frames without a subscription are not sent, so they are not lost
                with self._lock:
                    for publisher, source in self._losses.publishers():
                        name = topic(source, "instances")
                        if name.startswith(cancelled) and not outlet.count(source):
                            self._losses.restart(source, publisher)

    def _count(self, parts: list[bytes], outlet: BoundOutlet) -> bool:
        """Count a message, and keep it if new subscribers need it; return whether to pass it on."""
        try:
            source, header = decode_header(parts)
        except WireError:
            self._losses.tally.malformed += 1
            return False
        if isinstance(header, EventHeader):
            is_new = self._losses.add_event(source, header) is not None
            if is_new:
                self._kept.add(source, header, parts)
            return is_new
        is_new = self._losses.add_instances(source, header) is not None
        if not outlet.count(source):
            self._losses.restart(source, header.publisher)
        return is_new
