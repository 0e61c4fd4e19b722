"""Publisher: sends messages over ZeroMQ XPUB sockets."""

from __future__ import annotations

import os
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import zmq

from maskcast.engines.instances.instances import Instances
from maskcast.engines.instances.keypoints import Keypoints
from maskcast.pipeline.publisher.outlet import BoundOutlet, GatewayOutlet, Outlet
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.endpoint import check_endpoint
from maskcast.pipeline.wire.kept import KEPT_EVENTS
from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    MaskFormat,
    array_names,
    check_source_name,
    decode_header,
    encode,
    labels_id,
    topic,
)
from maskcast.pipeline.wire.server_keys import ServerKeys

if TYPE_CHECKING:
    from maskcast.pipeline.frame import Frame

LINGER_MS, GATEWAY_LINGER_MS, LOSSLESS_LINGER_MS = 200, 1000, 10_000
"""How long ``close`` waits for queued messages; none are queued for an absent gateway."""

ANSWER_WITHIN_S, DRAIN_S = 0.0005, 0.005
"""Maximum time for reading subscriptions in ``publish`` and ``event``, and when idle."""

RECONNECT_CHECK_S = 0.5
"""Interval at which connections to gateways are checked while nothing is published."""

MAX_REMOVED = 4096
"""Maximum number of removed sources whose sequence numbers are kept: four times as many as a
subscriber tracks."""


class Sent(NamedTuple):
    """Sequence number of a message, and when it was sent, UTC nanoseconds."""

    seq: int
    publish_ns: int


@dataclass(slots=True)
class _Stream:
    """The next sequence numbers of a source, and its events that are kept for new subscribers."""

    sent: int = 0
    events: int = 0
    kept: dict[str, list[bytes]] = field(default_factory=dict)
    ended: bool = False


class Publisher:
    """Publishes instances and events to any number of subscribers without waiting for them.

    A subscriber that is too slow loses messages once its queue is full; the sequence numbers show
    how many. A new subscriber immediately receives the label names, the size and the state of each
    source.

    A peer that floods the publisher with subscriptions is disconnected (``PeerGuard``). Until they
    are read, every source counts as subscribed to, and all kept events are sent once a second, so
    that new subscribers receive them in time.

    Not thread-safe: create, use and close it on one thread.

    Args:
        endpoint: "tcp://*:5555", "tcp://127.0.0.1:0" (a free port) or "ipc:///run/maskcast.sock".
        label_names: the model's class names; ``label_names[0]`` is the background.
        masks: the format of the masks (docs/wire.md).
        high_water_mark: messages queued for a slow subscriber.
        keys: encrypt, and admit only clients whose keys are allowed. None: anyone who can connect
            may subscribe; a warning is logged unless only this machine can.
        lossless: wait for slow subscribers instead of dropping messages for them. One that stops
            reading holds up the others until its heartbeats time out.
        gateways: connect to these gateways, "tcp://host:5556", instead of binding ``endpoint``.
        gateway_keys: for encrypted connections to the gateways; None for no encryption.
        keypoints: names and skeleton of the model's keypoints; None for a model without keypoints.

    Attributes:
        endpoint: the bound endpoint, with the real port; "" with gateways.

    Raises:
        InputError: the endpoint cannot be bound, or a gateway's endpoint is invalid. (A gateway
            that is not running is not an error.)
    """

    def __init__(
        self,
        endpoint: str,
        label_names: Sequence[str],
        *,
        masks: MaskFormat = "crop_u8",
        high_water_mark: int = 256,
        keys: ServerKeys | None = None,
        lossless: bool = False,
        gateways: Sequence[str] = (),
        gateway_keys: ClientKeys | None = None,
        keypoints: Keypoints | None = None,
    ) -> None:
        self._id = os.urandom(8).hex()
        self._label_names = list(label_names)
        self._labels_id = labels_id(label_names)
        self._masks: MaskFormat = masks
        self._keypoints = keypoints
        self._streams: dict[str, _Stream] = {}
        self._removed: OrderedDict[str, _Stream] = OrderedDict()
        self.endpoint = ""
        self._context = zmq.Context()  # of the connections to gateways
        self._outlets: list[Outlet] = []
        linger_ms = GATEWAY_LINGER_MS if gateways else LINGER_MS
        linger_ms = LOSSLESS_LINGER_MS if lossless else linger_ms
        try:
            for gateway in gateways:
                outlet = GatewayOutlet(
                    self._context,
                    check_endpoint(gateway, "tcp://host:5556"),
                    high_water_mark=high_water_mark,
                    keys=gateway_keys,
                    linger_ms=linger_ms,
                )
                self._outlets.append(outlet)
            if not gateways:
                bound = BoundOutlet(
                    endpoint,
                    high_water_mark=high_water_mark,
                    keys=keys,
                    lossless=lossless,
                    linger_ms=linger_ms,
                )
                self._outlets.append(bound)
                self.endpoint = bound.endpoint
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def has_backlog(self) -> bool:
        """Whether subscriptions wait to be read, or kept events to be sent."""
        return any(outlet.has_backlog for outlet in self._outlets)

    def publish(
        self,
        frame: Frame,
        instances: Instances,
        *,
        drops: Mapping[str, Mapping[str, int]] | None = None,
        zones: Mapping[str, int] | None = None,
        lines: Mapping[str, Mapping[str, int]] | None = None,
        dropped_before: int = 0,
        clock: str = "receipt",
        jpeg: bytes | Callable[[], bytes] | None = None,
        traceparent: str = "",
    ) -> Sent:
        """Send the instances of a frame.

        Without a subscriber nothing is encoded, but the sequence number increases.

        Args:
            frame: its timeline gives the processing time of each stage.
            instances: its instances.
            drops: frames of this source dropped since the start, by stage and reason.
            zones: number of tracks in each zone.
            lines: crossings of each line since the start, by direction.
            dropped_before: frames of this source dropped since its last message.
            clock: whose time ``frame.capture_ns`` is: "receipt" or "sender".
            jpeg: the image as JPEG, or a function that encodes it, which is called only if there is
                a subscriber; None sends no image.
            traceparent: the frame's span, W3C Trace Context; empty if it is not traced.

        Raises:
            InputError: the source's name is invalid in a topic.
            WireError: the frame cannot be encoded, for instance because it is too large.
        """
        source = frame.source
        stream = self._stream(source)
        self._read_subscriptions(ANSWER_WITHIN_S)
        has_subscribers = self.subscribers(source) > 0
        image = None
        if has_subscribers:
            image = jpeg() if callable(jpeg) else jpeg
        sent = Sent(stream.sent, time.time_ns())
        stream.sent += 1
        if not has_subscribers:
            return sent
        timeline = frame.timeline
        header = InstancesHeader(
            publisher=self._id,
            seq=sent.seq,
            index=frame.index,
            capture_ns=frame.capture_ns,
            publish_ns=sent.publish_ns,
            width=instances.width,
            height=instances.height,
            count=len(instances),
            masks="none" if instances.masks is None else self._masks,
            labels=self._labels_id,
            pts_s=frame.pts_s,
            clock=clock,
            stage_ms={
                stage: (end_ns - timeline.start_ns[stage]) / 1e6
                for stage, end_ns in timeline.end_ns.items()
            },
            drops={stage: dict(reasons) for stage, reasons in (drops or {}).items()},
            arrays=array_names(instances),
            dropped_before=dropped_before,
            traceparent=traceparent,
            zones=dict(zones or {}),
            lines={line: dict(crossings) for line, crossings in (lines or {}).items()},
            keypoints=None if instances.keypoints is None else self._keypoints,
        )
        self._send(encode(InstancesMessage(source, header, instances, image)))
        return sent

    def event(self, source: str, name: str, /, **data: Any) -> None:
        """Send an event of a source: "state", "size", "ended" or another of docs/wire.md.

        The last "state" or "ended" and the last "size" are sent again to new subscribers.

        Args:
            source: the source's name.
            name: the event's name.
            data: its data: numbers, strings, and lists and dicts of them.

        Raises:
            InputError: the source's name is invalid in a topic.
        """
        self._stream(source)
        self._read_subscriptions(ANSWER_WITHIN_S)
        self._send_event(source, name, data)

    def relay(self, parts: Sequence[bytes]) -> None:
        """Send a message of another publisher unchanged, with that publisher's id and numbers.

        Kept events are sent to new subscribers, as with ``event``. Do not use it together with
        ``publish`` and ``event``.

        Raises:
            WireError: part 0 or 1 is malformed.
        """
        source, header = decode_header(parts)
        stream = self._streams.setdefault(source, _Stream())
        self._read_subscriptions(ANSWER_WITHIN_S)
        if isinstance(header, EventHeader):
            self._keep(stream, header.event, list(parts))
        self._send(parts)

    def forget(self, source: str) -> None:
        """Stop announcing a removed source to new subscribers.

        If the name is used again, its sequence numbers continue: subscribers ignore smaller ones.
        """
        if (stream := self._streams.pop(source, None)) is not None:
            self._removed[source] = _Stream(stream.sent, stream.events)
            if len(self._removed) > MAX_REMOVED:
                self._removed.popitem(last=False)

    def answer_subscriptions(self) -> None:
        """Send kept events to peers that have subscribed since the last call.

        ``publish`` and ``event`` do this too; call it regularly while there is nothing to send.
        """
        self._read_subscriptions(DRAIN_S)

    def subscribers(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while some are unread.

        Subscribers of a gateway with the same subscription count as one.
        """
        return sum(outlet.count(source) for outlet in self._outlets)

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""
        return sum(outlet.cut_off for outlet in self._outlets)

    def wait_for_subscribers(self, count: int, timeout_s: float, sources: Sequence[str]) -> bool:
        """Wait until each of the sources has ``count`` subscribers; return False on a timeout."""
        deadline_s = time.monotonic() + timeout_s
        while True:
            self.answer_subscriptions()
            if all(self.subscribers(source) >= count for source in sources):
                return True
            remaining_s = deadline_s - time.monotonic()
            if remaining_s <= 0:
                return False
            poller = zmq.Poller()
            for outlet in self._outlets:
                for socket in outlet.sockets:
                    poller.register(socket, zmq.POLLIN)
            wait_s = 0.0 if self.has_backlog else min(remaining_s, RECONNECT_CHECK_S)
            poller.poll(int(wait_s * 1000) + 1)

    def close(self) -> None:
        """Send queued messages, for at most 0.2 s, and free the endpoint.

        The limit is 1 s with gateways and 10 s with ``lossless``.
        """
        for outlet in self._outlets:
            outlet.close()
        self._context.term()

    def _stream(self, source: str) -> _Stream:
        """Return a source's stream; if it is new, send its label names first."""
        if (stream := self._streams.get(source)) is None:
            check_source_name(source)
            stream = self._streams[source] = self._removed.pop(source, _Stream())
            data = {"id": self._labels_id, "names": self._label_names}
            self._send_event(source, "labels", data)
        return stream

    def _send_event(self, source: str, name: str, data: dict[str, Any]) -> None:
        stream = self._streams[source]
        header = EventHeader(
            publisher=self._id,
            seq=stream.events,
            publish_ns=time.time_ns(),
            event=name,
            sent=stream.sent,
            data=data,
        )
        parts = encode(EventMessage(source, header))
        stream.events += 1
        self._keep(stream, name, parts)
        self._send(parts)

    def _keep(self, stream: _Stream, name: str, parts: list[bytes]) -> None:
        """Keep an event for new subscribers if it is one that they need."""
        if slot := KEPT_EVENTS.get(name):
            stream.kept[slot] = parts
        if slot == "state":
            stream.ended = name == "ended"

    def _send(self, parts: Sequence[bytes]) -> None:
        for outlet in self._outlets:
            outlet.send(parts)

    def _read_subscriptions(self, within_s: float) -> None:
        """Read subscriptions for a while, and send new subscribers the kept events."""
        for outlet in self._outlets:
            outlet.answer(within_s, self._kept_events)

    def _kept_events(self, joined: tuple[bytes, ...]) -> Iterator[list[bytes]]:
        """Yield the kept events for new subscriptions to these prefixes, each event once.

        Sources that have ended come last, so that a subscriber to all sources does not conclude
        that there are no others.
        """
        for source, stream in sorted(self._streams.items(), key=lambda item: item[1].ended):
            if topic(source, "event").startswith(joined):
                yield from stream.kept.values()
