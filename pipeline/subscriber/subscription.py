"""Subscription: receives published frames and events, synchronously or with asyncio."""

from __future__ import annotations

import threading
import time
from collections.abc import AsyncIterator, Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Generic, Self, TypeVar, cast

import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.subscriber.backlog import Arrival, Backlog, Policy
from maskcast.pipeline.subscriber.connection import Connection
from maskcast.pipeline.subscriber.losses import Tally
from maskcast.pipeline.subscriber.received import PublishedFrame, StreamEvent
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import missing_socket
from maskcast.pipeline.wire.message import (
    VERSION,
    WireError,
    decode_body,
)
from maskcast.pipeline.wire.recording import read_recording

__all__ = ["EndOfStreams", "Policy", "PublishedFrame", "StreamEvent", "Subscription"]

Received = TypeVar("Received", bound=PublishedFrame | StreamEvent)
"""The items of a subscription: frames, or frames and events."""

MAX_PARTS = 6
"""Number of parts of a message in this version; further parts are discarded."""


class EndOfStreams(Exception):  # noqa: N818 - not an error
    """Every source has ended."""


class Subscription(Generic[Received]):
    """Connections to publishers, as returned by ``subscribe``.

    A background thread owns the sockets and receives messages as they arrive, because ZeroMQ's
    queues would keep old frames and drop new ones. Use ``receive`` and the loops on one thread at a
    time; ``close`` is thread-safe.
    """

    def __init__(
        self,
        endpoints: tuple[str, ...],
        sources: tuple[str, ...] | None,
        *,
        policy: Policy,
        timeout_s: float,
        events: bool,
        until_ended: bool,
        high_water_mark: int,
        max_message_bytes: int,
        keys: ClientKeys | None,
        recordings: tuple[Path, ...] = (),
    ) -> None:
        self._endpoints = () if recordings else endpoints
        self._recordings = recordings
        self._sources = sources
        self._policy: Policy = "all" if recordings else policy
        self._timeout_s = timeout_s
        self._events = events
        self._until_ended = until_ended and not recordings
        self._high_water_mark = high_water_mark
        self._max_message_bytes = max_message_bytes
        self._keys = keys
        self._backlog = self._new_backlog()  # its lock guards everything below
        self._problems: dict[str, str] = {}  # by endpoint
        self._fault: BaseException | None = None
        self._broken = False
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Connect. ``with`` and the loops do this.

        Raises:
            InputError: an endpoint is invalid. (A publisher that is not running is not an error.)
        """
        context = zmq.Context()
        prefixes = [""] if self._sources is None else [f"{name}/" for name in self._sources]
        connections: list[Connection] = []
        try:
            for endpoint in self._endpoints:
                connection = Connection(
                    context,
                    endpoint,
                    [f"{VERSION}/{prefix}" for prefix in prefixes],
                    high_water_mark=self._high_water_mark,
                    max_message_bytes=self._max_message_bytes,
                    keys=self._keys,
                )
                connections.append(connection)
        except BaseException:
            for connection in connections:
                connection.close()
            context.term()
            raise
        self._backlog = self._new_backlog()
        self._problems.clear()
        self._fault = None
        self._broken = False
        self._context = context
        self._thread = threading.Thread(
            target=self._read_recordings if self._recordings else self._receive_messages,
            args=(prefixes,) if self._recordings else (connections,),
            name="maskcast-subscriber",
            daemon=True,
        )
        self._thread.start()
        return self

    def close(self) -> None:
        """Disconnect, and end a waiting loop. Safe to call twice."""
        with self._backlog.changed:
            self._backlog.closed = True
            context, self._context = self._context, None
            thread, self._thread = self._thread, None
            self._backlog.wake()
        if context is not None and thread is not None:
            context.term()  # wakes the thread, and waits until it has closed its sockets
            thread.join()

    @property
    def tally(self) -> Tally:
        """Message counts so far."""
        with self._backlog.changed:
            return replace(self._backlog.losses.tally)

    @property
    def broken(self) -> bool:
        """Whether a connection has been lost since ``open``. It is reconnected automatically."""
        return self._broken

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Received]:
        """Yield ``PublishedFrame`` objects, and ``StreamEvent`` objects if ``events`` is set."""
        opened = self._context is not None
        if not opened:
            self.open()
        try:
            while True:
                yield self.receive()
        except EndOfStreams:
            return
        finally:
            if not opened:
                self.close()

    async def __aiter__(self) -> AsyncIterator[Received]:
        """Yield the same items as the synchronous loop, without blocking the event loop."""
        opened = self._context is not None
        if not opened:
            self.open()
        try:
            while True:
                yield await self.receive_async()
        except EndOfStreams:
            return
        finally:
            if not opened:
                self.close()

    def receive(self, timeout_s: float | None = None) -> Received:
        """Wait for the next frame or event.

        Args:
            timeout_s: seconds; None for the value given to ``subscribe``.

        Raises:
            TimeoutError: nothing arrived within ``timeout_s``.
            EndOfStreams: every source has ended, or the subscription was closed.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        while True:
            with self._backlog.changed:
                while (item := self._next()) is None:
                    remaining_s = deadline_s - time.monotonic()
                    if remaining_s <= 0:
                        raise TimeoutError(self._timeout_message(timeout_s))
                    self._backlog.changed.wait(min(remaining_s, 3600))
            if (decoded := self._decode(item)) is not None:
                return cast("Received", decoded)  # events are queued only on request

    async def receive_async(self, timeout_s: float | None = None) -> Received:
        """Wait like ``receive``, without blocking the event loop."""
        import asyncio  # imported late: it takes 7 MB of memory

        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline_s = time.monotonic() + timeout_s
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._backlog.changed:
            self._backlog.notify = partial(loop.call_soon_threadsafe, arrived.set)
        try:
            while True:
                arrived.clear()
                with self._backlog.changed:
                    item = self._next()
                if item is not None:
                    if (decoded := self._decode(item)) is not None:
                        return cast("Received", decoded)
                    continue
                try:
                    async with asyncio.timeout(max(deadline_s - time.monotonic(), 0)):
                        await arrived.wait()
                except TimeoutError:
                    with self._backlog.changed:
                        message = self._timeout_message(timeout_s)
                    raise TimeoutError(message) from None
        finally:
            with self._backlog.changed:
                self._backlog.notify = None

    def _new_backlog(self) -> Backlog:
        return Backlog(self._policy, events=self._events, high_water_mark=self._high_water_mark)

    def _next(self) -> Arrival | StreamEvent | None:
        """Take the next item from the queue. The caller holds the lock."""
        if isinstance(self._fault, InputError) and not self._backlog.has_items:
            raise self._fault  # the recording is damaged after the last item
        if self._fault is not None and not isinstance(self._fault, InputError):
            raise RuntimeError("the subscriber's thread failed") from self._fault
        if self._backlog.closed:
            raise EndOfStreams
        if self._context is None:
            raise RuntimeError("not connected: use `with subscribe(...) as subscription`")
        if (item := self._backlog.take()) is not None:
            return item
        if self._backlog.finished:
            raise EndOfStreams
        if self._until_ended and self._backlog.losses.all_ended(self._sources):
            raise EndOfStreams
        return None

    def _decode(self, item: Arrival | StreamEvent) -> PublishedFrame | StreamEvent | None:
        """Decode an item from the queue; return None if it is malformed."""
        if isinstance(item, StreamEvent):
            return item
        source, header, gap = item.source, item.header, item.gap
        try:
            message = decode_body(source, header, item.parts)
        except WireError:
            with self._backlog.changed:
                self._backlog.losses.tally.malformed += 1
                self._backlog.carry_over(source, gap)
            return None
        with self._backlog.changed:
            label_names = self._backlog.losses.label_names(header.labels)
        return PublishedFrame.from_message(
            message,
            received_ns=item.received_ns,
            lost_before=gap.lost,
            skipped_before=item.skipped,
            restarted=gap.restarted,
            label_names=label_names,
            recorded=bool(self._recordings),
        )

    def _read_recordings(self, prefixes: list[str]) -> None:
        """Read the files until their end or ``close``. Runs on the background thread."""
        wanted = tuple(f"{VERSION}/{prefix}".encode() for prefix in prefixes)
        backlog = self._backlog
        try:
            for path in self._recordings:
                for parts, received_ns in read_recording(path):
                    with backlog.changed:
                        if backlog.closed:
                            return
                        if parts[0].startswith(wanted):
                            backlog.add(parts[:MAX_PARTS], received_ns)
        except BaseException as error:
            with backlog.changed:
                self._fault = error
        finally:
            with backlog.changed:
                backlog.finished = True
                backlog.wake()

    def _receive_messages(self, connections: list[Connection]) -> None:
        """Receive until the context is terminated. Runs on the background thread."""
        try:
            while True:
                self._wait_for_input(connections)
                for connection in connections:
                    self._receive_from(connection)
        except zmq.ContextTerminated:
            pass
        except BaseException as error:
            with self._backlog.changed:
                self._fault = error
                self._backlog.wake()
        finally:
            for connection in connections:
                connection.close()

    def _wait_for_input(self, connections: list[Connection]) -> None:
        poller = zmq.Poller()
        due_s: list[float] = []
        for connection in connections:
            if (left_s := connection.replace_if_due()) is not None:
                due_s.append(left_s)
            poller.register(connection.socket, zmq.POLLIN)
            poller.register(connection.monitor, zmq.POLLIN)
        poller.poll(int(min(due_s) * 1000) + 1 if due_s else None)

    def _receive_from(self, connection: Connection) -> None:
        """Add the messages that have arrived on one connection, at most one batch."""
        connection.process_events()
        self._broken |= connection.broken
        for _ in range(self._high_water_mark):
            parts, oversized = connection.receive(MAX_PARTS), connection.take_oversized()
            received_ns = time.time_ns()
            with self._backlog.changed:
                self._backlog.losses.tally.malformed += oversized
                self._problems[connection.endpoint] = connection.problem
                if parts is not None:
                    self._backlog.add(parts, received_ns)
            if parts is None:
                return

    def _timeout_message(self, timeout_s: float) -> str:
        who = "any source" if self._sources is None else " or ".join(self._sources)
        where = ", ".join(self._endpoints)
        missing = map(missing_socket, self._endpoints)
        why = "; ".join(filter(None, (*self._problems.values(), *missing)))
        if not why and (states := self._backlog.losses.states()):
            named = ", ".join(f"{name} is {state}" for name, state in states.items())
            why = f"the publisher is connected ({named}) but sends no frames; check its log"
        if not why:
            keys = "whether it uses keys" if self._keys is None else "that it allows this key"
            why = f"check that maskcast publishes there, the names of the sources, and {keys}"
        return f"nothing from {who} at {where} for {timeout_s:g} s: {why}"
