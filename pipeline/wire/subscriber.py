"""Subscriber: an iterator over what publishers send."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, Self

import zmq

from maskcast.engines.errors import InputError
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import DEAD_AFTER_MS, HEARTBEAT_MS, check_endpoint
from maskcast.pipeline.wire.losses import Gap, LossTracker, Tally
from maskcast.pipeline.wire.message import (
    VERSION,
    EventHeader,
    InstancesHeader,
    InstancesMessage,
    WireError,
    check_source_name,
    decode,
    decode_header,
)
from maskcast.pipeline.wire.received import PublishedFrame, StreamEvent

__all__ = ["EndOfStreams", "Policy", "PublishedFrame", "StreamEvent", "Subscription", "subscribe"]

Policy = Literal["latest", "all"]

MOST_PARTS = 5
"""Parts of a message that are known; those behind belong to a later version."""


@dataclass(frozen=True, slots=True)
class _Arrival:
    """A message that waits to be asked for. It is decoded only then: many never are."""

    source: str
    header: InstancesHeader
    parts: list[bytes]
    received_ns: int
    gap: Gap
    skipped: int = 0


class EndOfStreams(Exception):  # noqa: N818 - nothing went wrong
    """Every source has ended."""


def subscribe(
    endpoints: str | Sequence[str],
    sources: str | Sequence[str] | None = None,
    *,
    policy: Policy = "latest",
    timeout_s: float = 5.0,
    events: bool = False,
    until_ended: bool = True,
    high_water_mark: int = 256,
    max_part_bytes: int = 64 << 20,
    server_key: str | Path | None = None,
    client_key: str | Path | None = None,
) -> Subscription:
    """Receive what publishers see.

    .. code-block:: python

        for frame in subscribe("tcp://camera-host:5555", sources="cam1"):
            print(frame.seq, frame.age_ms, frame.lost_before, len(frame.instances))

    The loop ends when every source has ended (of those named, or else of those heard of so far),
    and by TimeoutError when nothing comes for ``timeout_s``. ``async for`` works alike. With
    ``with`` the connection outlives a loop; without, it lasts as long as the loop does.

    Args:
        endpoints: where to connect: "tcp://host:5555", "ipc:///run/maskcast.sock", or several.
        sources: names of the sources wanted; all of them if None.
        policy: "latest" hands out the newest frame of each source and skips what you were too slow
            for, so that age stays bounded; "all" hands out every frame that arrives.
        timeout_s: how long to wait for the next frame (or event) before TimeoutError.
        events: hand out ``StreamEvent`` objects too.
        until_ended: end when every source has ended; if False, wait for it to come back.
        high_water_mark: how many messages are held for you; under policy "latest" there is one of
            a source, so it should not be less than there are sources.
        max_part_bytes: a publisher that sends a longer part is disconnected.
        server_key: the publisher's ``.key`` file, where it asks for keys.
        client_key: your ``.key_secret`` file, as ``maskcast keys new`` made it.

    Raises:
        InputError: an endpoint, a source name, the policy or a key is wrong.
    """
    endpoints = (endpoints,) if isinstance(endpoints, str) else tuple(endpoints)
    if isinstance(sources, str):
        sources = (sources,)
    if policy not in ("latest", "all"):
        raise InputError(f'policy {policy!r}: use "latest" or "all"')
    if sources is not None and not sources:
        raise InputError("no source to subscribe to: name one, or leave `sources` out for all")
    if not endpoints:
        raise InputError("no endpoint to subscribe to: use tcp://host:5555")
    keys = None
    if server_key is not None and client_key is not None:
        keys = ClientKeys.read(server_key, client_key)
    elif server_key is not None or client_key is not None:
        raise InputError("keys go together: give the server's .key and the client's .key_secret")
    return Subscription(
        tuple(check_endpoint(endpoint, "tcp://host:5555") for endpoint in endpoints),
        None if sources is None else tuple(check_source_name(name) for name in sources),
        policy=policy,
        timeout_s=timeout_s,
        events=events,
        until_ended=until_ended,
        high_water_mark=high_water_mark,
        max_part_bytes=max_part_bytes,
        keys=keys,
    )


class Subscription:
    """A connection to publishers; ``subscribe`` makes it.

    A thread of its own owns the socket and takes in messages as they come, because only so is the
    newest frame at hand when it is asked for: left in the queues of ZeroMQ, frames grow old there
    and newer ones are dropped in their favour. ``receive`` and the loops may be used from one
    thread at a time; ``close`` from any.
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
        max_part_bytes: int,
        keys: ClientKeys | None,
    ) -> None:
        self._endpoints = endpoints
        self._sources = sources
        self._policy = policy
        self._timeout_s = timeout_s
        self._events = events
        self._until_ended = until_ended
        self._high_water_mark = high_water_mark
        self._max_part_bytes = max_part_bytes
        self._keys = keys
        self._ledger = LossTracker()
        self._changed = threading.Condition()  # guards everything below, and the ledger
        self._waiting: dict[object, _Arrival | StreamEvent] = {}  # in the order to hand out
        self._lost: dict[str, Gap] = {}  # that no waiting frame of the source tells of
        self._notify: Callable[[], object] | None = None
        self._fault: BaseException | None = None
        self._closed = False
        self._context: zmq.Context[zmq.Socket[bytes]] | None = None
        self._thread: threading.Thread | None = None

    def open(self) -> Self:
        """Connect; ``with`` and the loops do so.

        Raises:
            InputError: an endpoint cannot be connected to. (That nobody answers there is no error.)
        """
        context = zmq.Context()
        socket = context.socket(zmq.SUB)
        socket.set(zmq.RCVHWM, self._high_water_mark)
        socket.set(zmq.LINGER, 0)
        socket.set(zmq.MAXMSGSIZE, self._max_part_bytes)
        socket.set(zmq.RECONNECT_IVL, 100)
        socket.set(zmq.RECONNECT_IVL_MAX, 1000)
        socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        socket.set(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
        if self._keys is not None:
            socket.set(zmq.CURVE_SERVERKEY, self._keys.server)
            socket.set(zmq.CURVE_PUBLICKEY, self._keys.own.public)
            socket.set(zmq.CURVE_SECRETKEY, self._keys.own.secret)
        prefixes = [""] if self._sources is None else [f"{name}/" for name in self._sources]
        for prefix in prefixes:
            socket.subscribe(f"{VERSION}/{prefix}")
        for endpoint in self._endpoints:
            try:
                socket.set(zmq.IPV6, int("[" in endpoint))
                socket.connect(endpoint)
            except zmq.ZMQError as error:
                socket.close()
                context.term()
                raise InputError(
                    f"cannot connect to {endpoint} ({error.strerror}): use tcp://host:5555 or "
                    "ipc:///path/to/socket"
                ) from error
        self._ledger = LossTracker()
        self._waiting.clear()
        self._lost.clear()
        self._fault = None
        self._closed = False
        self._context = context
        self._thread = threading.Thread(
            target=self._take_in, args=(socket,), name="maskcast-subscriber", daemon=True
        )
        self._thread.start()
        return self

    def close(self) -> None:
        """Disconnect, and end whatever loop is waiting. Calling it twice is safe."""
        with self._changed:
            self._closed = True
            context, self._context = self._context, None
            thread, self._thread = self._thread, None
            self._wake()
        if context is not None and thread is not None:
            context.term()  # ends the thread's wait; returns when it has closed its socket
            thread.join()

    @property
    def tally(self) -> Tally:
        """How messages have fared so far."""
        with self._changed:
            return replace(self._ledger.tally)

    def __enter__(self) -> Self:
        return self.open()

    def __exit__(self, *_: object) -> None:
        self.close()

    async def __aenter__(self) -> Self:
        return self.open()

    async def __aexit__(self, *_: object) -> None:
        self.close()

    def __iter__(self) -> Iterator[Any]:
        """Yield ``PublishedFrame`` objects, and ``StreamEvent`` ones where they were asked for."""
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

    async def __aiter__(self) -> AsyncIterator[Any]:
        """Yield as the synchronous loop does, without blocking the event loop."""
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

    def receive(self, timeout_s: float | None = None) -> PublishedFrame | StreamEvent:
        """Wait for the next frame or event.

        Args:
            timeout_s: how long; None for what ``subscribe`` was given.

        Raises:
            TimeoutError: nothing came.
            EndOfStreams: every source has ended, or the subscription was closed.
        """
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        while True:
            with self._changed:
                while (item := self._next()) is None:
                    remaining_s = deadline - time.monotonic()
                    if remaining_s <= 0:
                        raise TimeoutError(self._silence(timeout_s))
                    self._changed.wait(min(remaining_s, 3600))
            if (handed := self._hand_out(item)) is not None:
                return handed

    async def receive_async(self, timeout_s: float | None = None) -> PublishedFrame | StreamEvent:
        """Wait for the next frame or event without blocking the event loop; as ``receive``."""
        timeout_s = self._timeout_s if timeout_s is None else timeout_s
        deadline = time.monotonic() + timeout_s
        loop, arrived = asyncio.get_running_loop(), asyncio.Event()
        with self._changed:
            self._notify = partial(loop.call_soon_threadsafe, arrived.set)
        try:
            while True:
                arrived.clear()
                with self._changed:
                    item = self._next()
                if item is not None:
                    if (handed := self._hand_out(item)) is not None:
                        return handed
                    continue
                try:
                    async with asyncio.timeout(max(deadline - time.monotonic(), 0)):
                        await arrived.wait()
                except TimeoutError:
                    with self._changed:
                        message = self._silence(timeout_s)
                    raise TimeoutError(message) from None
        finally:
            with self._changed:
                self._notify = None

    def _next(self) -> _Arrival | StreamEvent | None:
        """Take the item that is next in line, under the lock."""
        if self._fault is not None:
            raise RuntimeError("the subscriber's thread failed") from self._fault
        if self._closed:
            raise EndOfStreams
        if self._context is None:
            raise RuntimeError("not connected: use `with subscribe(...) as subscription`")
        if self._waiting:
            item = self._waiting.pop(next(iter(self._waiting)))
            self._changed.notify_all()  # room for the thread to go on
            return item
        if self._until_ended and self._ledger.all_ended(self._sources):
            raise EndOfStreams
        return None

    def _hand_out(self, item: _Arrival | StreamEvent) -> PublishedFrame | StreamEvent | None:
        """Decode what was taken; None where it turns out malformed."""
        if isinstance(item, StreamEvent):
            return item
        source, header, gap = item.source, item.header, item.gap
        try:
            message = decode(item.parts)
        except WireError:
            with self._changed:
                self._ledger.tally.malformed += 1
                self._owe(source, gap)
            return None
        assert isinstance(message, InstancesMessage)
        with self._changed:
            label_names = self._ledger.label_names(header.labels)
        return PublishedFrame(
            source=source,
            publisher=header.publisher,
            seq=header.seq,
            index=header.index,
            pts_s=header.pts_s,
            capture_ns=header.capture_ns,
            publish_ns=header.publish_ns,
            received_ns=item.received_ns,
            age_ms=(time.time_ns() - header.capture_ns) / 1e6,
            lost_before=gap.lost,
            skipped_before=item.skipped,
            restarted=gap.restarted,
            clock=header.clock,
            stage_ms=header.stage_ms,
            drops=header.drops,
            zones=header.zones,
            lines=header.lines,
            instances=message.instances,
            label_names=label_names,
            jpeg=message.jpeg,
        )

    def _take_in(self, socket: zmq.Socket[bytes]) -> None:
        """Receive until the context is terminated: the body of the thread that owns the socket."""
        try:
            while True:
                parts = socket.recv_multipart()[:MOST_PARTS]
                received_ns = time.time_ns()
                with self._changed:
                    self._enter(parts, received_ns)
        except zmq.ContextTerminated:
            pass
        except BaseException as error:
            with self._changed:
                self._fault = error
                self._wake()
        finally:
            socket.close(linger=0)

    def _enter(self, parts: list[bytes], received_ns: int) -> None:
        """Enter a message into the ledger and put it in line, under the lock."""
        try:
            source, header = decode_header(parts)
        except WireError:
            self._ledger.tally.malformed += 1
            return
        if isinstance(header, EventHeader):
            if (gap := self._ledger.enter_event(source, header)) is None:
                return
            self._owe(source, gap)
            if self._events:
                event = StreamEvent(
                    source,
                    header.publisher,
                    header.event,
                    header.data,
                    header.publish_ns,
                    received_ns,
                )
                self._put((source, header.event), event)
            self._wake()
        elif (gap := self._ledger.enter_instances(source, header)) is not None:
            owed = self._lost.pop(source, Gap(0, False))
            gap = Gap(gap.lost + owed.lost, gap.restarted or owed.restarted)
            self._put((source, None), _Arrival(source, header, parts, received_ns, gap))
            self._wake()

    def _put(self, key: object, item: _Arrival | StreamEvent) -> None:
        """Put an item in line: in place of an older one of its kind, or behind all of them."""
        if self._policy == "all":
            key = object()
        while (
            key not in self._waiting
            and len(self._waiting) >= self._high_water_mark
            and not self._closed
        ):
            self._changed.wait()
        if isinstance(item, _Arrival) and isinstance(older := self._waiting.get(key), _Arrival):
            self._ledger.tally.skipped += 1
            gap = Gap(item.gap.lost + older.gap.lost, item.gap.restarted or older.gap.restarted)
            item = replace(item, gap=gap, skipped=older.skipped + 1)
        self._waiting[key] = item

    def _owe(self, source: str, gap: Gap) -> None:
        """Remember a gap for the next frame of the source."""
        owed = self._lost.get(source, Gap(0, False))
        self._lost[source] = Gap(owed.lost + gap.lost, owed.restarted or gap.restarted)

    def _wake(self) -> None:
        self._changed.notify_all()
        if self._notify is not None:
            self._notify()

    def _silence(self, timeout_s: float) -> str:
        who = "any source" if self._sources is None else " or ".join(self._sources)
        where = ", ".join(self._endpoints)
        states = ", ".join(f"{name} is {state}" for name, state in self._ledger.states().items())
        keys = "does it ask for keys?" if self._keys is None else "does it allow this client's key?"
        hint = states or f"is maskcast running there, is the source's name right, and {keys}"
        return f"nothing from {who} at {where} for {timeout_s:g} s: {hint}"
