"""Publisher: sends messages over a ZeroMQ XPUB socket."""

from __future__ import annotations

import logging
import os
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Self

import zmq

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.log import fields
from maskcast.pipeline.publisher.peers import PeerGuard
from maskcast.pipeline.publisher.subscriptions import Subscriptions
from maskcast.pipeline.wire.curve import ServerKeys
from maskcast.pipeline.wire.endpoint import (
    bind,
    is_loopback,
    remove_socket_file,
    set_common_options,
)
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

if TYPE_CHECKING:
    from maskcast.pipeline.frame import Frame

LINGER_MS, LOSSLESS_LINGER_MS = 200, 10_000
"""Time that ``close`` gives to queued messages."""

ANSWER_WITHIN_S, DRAIN_S = 0.0005, 0.005
"""Time that ``publish`` and ``event`` spend on new subscriptions, and ``answer_subscriptions``."""

RESEND_S = 1.0
"""While subscriptions arrive faster than they are read, kept events are sent this often."""

MAX_SUBSCRIPTION_BYTES = 128
"""Longest subscription: topics are shorter, and longer ones cost memory."""

MAX_HANDSHAKE_BYTES = 512
"""The same limit with CURVE, whose handshake needs more."""

MAX_REMOVED = 4096
"""Removed sources whose numbers are kept; four times as many as a subscriber keeps account of."""

_logger = logging.getLogger(__name__)


class Sent(NamedTuple):
    """Number and time of a message."""

    seq: int
    publish_ns: int


@dataclass(slots=True)
class _Stream:
    """Messages of one source: numbers of the next ones, and events kept for new subscribers."""

    sent: int = 0
    events: int = 0
    kept: dict[str, list[bytes]] = field(default_factory=dict)
    ended: bool = False


class Publisher:
    """Publishes instances and events to any number of subscribers, and waits for none of them.

    A subscriber that is too slow loses messages once its queue is full; the sequence numbers show
    how many. A new subscriber receives the label names, the size and the state of each source at
    once.

    A peer that floods subscriptions is disconnected (``PeerGuard``). Until its subscriptions are
    read, every source counts as subscribed to and kept events are sent once a second, so that new
    subscribers do not wait behind them.

    Not thread-safe: create, use and close it on one thread.

    Args:
        endpoint: "tcp://*:5555", "tcp://127.0.0.1:0" (a free port), "ipc:///run/maskcast.sock".
        label_names: the model's; ``label_names[0]`` is the background.
        masks: the format that masks are sent in.
        high_water_mark: messages queued for a slow subscriber.
        keys: encrypt, and admit only clients whose keys are allowed. None: anyone who can connect
            may subscribe; a warning is logged unless only this machine can.
        lossless: wait for slow subscribers instead of dropping messages for them. One that stops
            reading holds up the others until its heartbeats time out.

    Attributes:
        endpoint: the bound endpoint, with the real port.
        has_backlog: whether more subscriptions wait than could be read.

    Raises:
        InputError: the endpoint cannot be bound.
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
    ) -> None:
        self._id = os.urandom(8).hex()
        self._label_names = list(label_names)
        self._labels_id = labels_id(label_names)
        self._masks: MaskFormat = masks
        self._streams: dict[str, _Stream] = {}
        self._removed: OrderedDict[str, _Stream] = OrderedDict()
        self._subscriptions = Subscriptions()
        self._joined: set[bytes] = set()  # prefixes of new subscribers
        self._resend_at_s = 0.0
        self.has_backlog = False
        self.endpoint = ""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.XPUB_VERBOSER, 1)
        self._socket.set(zmq.XPUB_NODROP, int(lossless))
        self._socket.set(zmq.SNDHWM, high_water_mark)
        self._socket.set(zmq.RCVHWM, 100)  # subscriptions of one peer, before libzmq's own queue
        set_common_options(
            self._socket,
            linger_ms=LOSSLESS_LINGER_MS if lossless else LINGER_MS,
            max_part_bytes=MAX_SUBSCRIPTION_BYTES if keys is None else MAX_HANDSHAKE_BYTES,
        )
        self._guard = PeerGuard(self._socket, keys)
        try:
            self.endpoint = bind(self._socket, endpoint, "publish")
        except InputError:
            self.close()
            raise
        if keys is None and not is_loopback(self.endpoint):
            advice = (
                "make keys with `maskcast keys new` and set publish.curve, "
                "or publish on tcp://127.0.0.1:<port>"
            )
            shown = fields(endpoint=self.endpoint, advice=advice)
            _logger.warning("publishing_without_keys", extra=shown)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        jpeg: bytes | None = None,
    ) -> Sent:
        """Send the instances of a frame.

        Without a subscriber nothing is encoded, but the sequence number is counted.

        Args:
            frame: its timeline gives the processing time of each stage.
            instances: its instances.
            drops: frames of this source dropped since the start, by stage and reason.
            zones: instances in each zone.
            lines: crossings of each line since the start, by direction.
            dropped_before: frames of this source dropped since its last message.
            clock: whose time ``frame.capture_ns`` is: "receipt" or "sender".
            jpeg: the image, to be sent along.

        Raises:
            InputError: the source's name cannot stand in a topic.
            WireError: the frame cannot be encoded, for instance because it is too large.
        """
        source = frame.source
        stream = self._stream(source)
        self._read_subscriptions(ANSWER_WITHIN_S)
        sent = Sent(stream.sent, time.time_ns())
        stream.sent += 1
        if not self.subscribers(source):
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
            zones=dict(zones or {}),
            lines={line: dict(crossings) for line, crossings in (lines or {}).items()},
        )
        self._socket.send_multipart(encode(InstancesMessage(source, header, instances, jpeg)))
        return sent

    def event(self, source: str, name: str, /, **data: Any) -> None:
        """Send an event of a source: "state", "size", "ended" or another of docs/wire.md.

        The last "state" or "ended" and the last "size" are sent again to new subscribers.

        Args:
            source: the source's name.
            name: the event's name.
            data: its data: numbers, strings, lists and maps of them.

        Raises:
            InputError: the source's name cannot stand in a topic.
        """
        self._stream(source)
        self._read_subscriptions(ANSWER_WITHIN_S)
        self._send_event(source, name, data)

    def relay(self, parts: Sequence[bytes]) -> None:
        """Send a message of another publisher as it is, with that one's id and numbers.

        Its kept events are sent to new subscribers like this publisher's own. Do not mix it with
        ``publish`` and ``event``.

        Raises:
            WireError: part 0 or 1 is malformed.
        """
        source, header = decode_header(parts)
        stream = self._streams.setdefault(source, _Stream())
        self._read_subscriptions(ANSWER_WITHIN_S)
        if isinstance(header, EventHeader):
            self._keep(stream, header.event, list(parts))
        self._socket.send_multipart(parts)

    def forget(self, source: str) -> None:
        """Stop announcing a removed source to new subscribers.

        Its numbers go on if the name is used again: subscribers would ignore smaller ones.
        """
        if (stream := self._streams.pop(source, None)) is not None:
            self._removed[source] = _Stream(stream.sent, stream.events)
            if len(self._removed) > MAX_REMOVED:
                self._removed.popitem(last=False)

    def answer_subscriptions(self) -> None:
        """Send kept events to those who subscribed since the last call.

        ``publish`` and ``event`` do so too; call it regularly while there is nothing to send.
        """
        self._read_subscriptions(DRAIN_S)

    def subscribers(self, source: str) -> int:
        """Count the subscriptions to a source's instances; at least 1 while there is a backlog."""
        counted = self._subscriptions.count(topic(source, "instances"))
        return max(counted, int(self.has_backlog))

    @property
    def cut_off(self) -> int:
        """Connections closed because the peer sent a message that was too long or malformed."""
        return self._guard.cut_off

    def wait_for_subscribers(self, count: int, timeout_s: float, sources: Sequence[str]) -> bool:
        """Wait until each of the sources has ``count`` subscribers; False if that took too long."""
        deadline = time.monotonic() + timeout_s
        while True:
            self.answer_subscriptions()
            if all(self.subscribers(source) >= count for source in sources):
                return True
            remaining_s = deadline - time.monotonic()
            if remaining_s <= 0:
                return False
            self._socket.poll(int(remaining_s * 1000) + 1)

    def close(self) -> None:
        """Send what is still queued, for 0.2 s at most (``lossless``: 10 s); free the endpoint."""
        self._socket.close()
        self._context.term()
        self._guard.join()
        remove_socket_file(self.endpoint)

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
        self._socket.send_multipart(parts)

    def _keep(self, stream: _Stream, name: str, parts: list[bytes]) -> None:
        """Keep an event for new subscribers, if it is one of those."""
        if slot := KEPT_EVENTS.get(name):
            stream.kept[slot] = parts
        if slot == "state":
            stream.ended = name == "ended"

    def _read_subscriptions(self, within_s: float) -> None:
        """Read subscriptions for a while, and send new subscribers the kept events."""
        deadline_s = time.monotonic() + within_s
        try:
            while time.monotonic() < deadline_s:
                message = self._socket.recv(zmq.DONTWAIT, copy=False)
                content = bytes(message.bytes)
                kind, prefix = content[:1], content[1:]
                if kind == b"\x01":
                    self._subscriptions.add(prefix)
                    self._joined.add(prefix)
                elif kind == b"\x00" and not _is_from_peer(message):
                    self._subscriptions.remove(prefix)
            self.has_backlog = bool(int(self._socket.get(zmq.EVENTS)) & zmq.POLLIN)
        except zmq.Again:
            self.has_backlog = False
        if not self.has_backlog:
            if self._joined:
                self._send_kept(tuple(self._joined))
                self._joined.clear()
        elif time.monotonic() >= self._resend_at_s:
            self._resend_at_s = time.monotonic() + RESEND_S
            self._send_kept((b"",))
            self._joined.clear()

    def _send_kept(self, joined: tuple[bytes, ...]) -> None:
        """Send kept events again to those who subscribed to a prefix, once however many they are.

        XPUB sends them to other subscribers too, who recognise them by their sequence numbers.
        Sources that have ended come last, so that a subscriber to all sources does not conclude
        that there are no others.
        """
        for source, stream in sorted(self._streams.items(), key=lambda item: item[1].ended):
            if topic(source, "event").startswith(joined):
                for parts in stream.kept.values():
                    self._socket.send_multipart(parts)


def _is_from_peer(message: zmq.Frame) -> bool:
    """Whether a peer sent it, and not libzmq for one whose connection is gone.

    libzmq's own messages have no metadata, so that asking for any property of theirs fails.
    """
    try:
        message.get("__fd")
    except zmq.ZMQError:
        return False
    return True
