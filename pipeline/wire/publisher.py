"""Publisher: the socket that messages leave by."""

from __future__ import annotations

import logging
import os
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Self

import zmq

from maskcast.engines.errors import InputError
from maskcast.engines.instances import Instances
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.wire.authenticator import Authenticator
from maskcast.pipeline.wire.curve import ServerKeys
from maskcast.pipeline.wire.endpoint import (
    DEAD_AFTER_MS,
    HEARTBEAT_MS,
    STALLED_AFTER_MS,
    bind,
    is_loopback,
    remove_socket_file,
)
from maskcast.pipeline.wire.message import (
    EventHeader,
    EventMessage,
    InstancesHeader,
    InstancesMessage,
    MaskFormat,
    array_names,
    check_source_name,
    encode,
    labels_id,
    topic,
)
from maskcast.pipeline.wire.subscriptions import Subscriptions

LINGER_MS = 200

ANSWER_WITHIN_S = 0.0005
"""So long ``publish`` attends to those who come and go; who is left has to wait for the next."""

LONGEST_SUBSCRIPTION = 128
"""Bytes that a subscriber may send at once: topics are shorter, and longer ones cost memory."""

LONGEST_HANDSHAKE = 512
"""Likewise while CURVE is agreed upon."""

_logger = logging.getLogger(__name__)

_KEPT = {"labels": "labels", "size": "size", "state": "state", "ended": "state"}
"""Which events a late subscriber is told of, and whose place each takes among those kept."""


class Sent(NamedTuple):
    """What the wire made of a frame."""

    seq: int
    publish_ns: int


class Publisher:
    """Publishes instances and events to any number of subscribers, and waits for none of them.

    A subscriber that is too slow loses messages once its queue is full; the sequence numbers tell
    it how many. A subscriber that comes late is told the label names, the size and the state of
    each source at once.

    Not thread-safe: it is made, used and closed on one thread.

    Args:
        endpoint: "tcp://*:5555", "tcp://127.0.0.1:0" (a free port), "ipc:///run/maskcast.sock".
        label_names: the model's; ``label_names[0]`` is the background.
        masks: the format that masks are sent in.
        high_water_mark: how many messages are held for a subscriber that is behind.
        keys: encrypt, and let only those subscribe whose keys are allowed. None: neither; if others
            than this machine can connect then, a warning is logged.

    Attributes:
        endpoint: where it can be reached, with the real port.

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
    ) -> None:
        self._id = os.urandom(8).hex()
        self._label_names = list(label_names)
        self._labels_id = labels_id(label_names)
        self._masks: MaskFormat = masks
        self._sent: Counter[str] = Counter()
        self._events: Counter[str] = Counter()
        self._kept: dict[str, dict[str, list[bytes]]] = {}
        self._ended: set[str] = set()
        self._subscriptions = Subscriptions()
        self.endpoint = ""
        self._context = zmq.Context()
        self._socket = self._context.socket(zmq.XPUB)
        self._socket.set(zmq.XPUB_VERBOSER, 1)
        self._socket.set(zmq.SNDHWM, high_water_mark)
        self._socket.set(zmq.RCVHWM, 100)  # of subscriptions of one peer, lest they come in floods
        self._socket.set(zmq.LINGER, LINGER_MS)
        self._socket.set(zmq.HEARTBEAT_IVL, HEARTBEAT_MS)
        self._socket.set(zmq.HEARTBEAT_TIMEOUT, DEAD_AFTER_MS)
        self._socket.set(zmq.HEARTBEAT_TTL, DEAD_AFTER_MS)
        self._socket.set(zmq.TCP_MAXRT, STALLED_AFTER_MS)
        longest = LONGEST_SUBSCRIPTION if keys is None else LONGEST_HANDSHAKE
        self._socket.set(zmq.MAXMSGSIZE, longest)
        self._authenticator = None if keys is None else Authenticator(self._socket, keys)
        try:
            self.endpoint = bind(self._socket, endpoint, "publish")
        except InputError:
            self.close()
            raise
        if keys is None and not is_loopback(self.endpoint):
            _logger.warning(
                "%s: everyone in the network can watch; make keys with `maskcast keys new` and "
                "name them under publish.curve, or publish on tcp://127.0.0.1:<port>",
                self.endpoint,
            )

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
        clock: str = "receipt",
        jpeg: bytes | None = None,
    ) -> Sent:
        """Send what was seen in a frame.

        Nothing is encoded where nobody listens; the sequence number counts on.

        Args:
            frame: its timeline gives the time that each stage took.
            instances: what was seen in it.
            drops: frames of this source dropped since the start, by stage, by reason.
            zones: instances in each zone.
            lines: crossings of each line since the start, by direction.
            clock: whose time ``frame.capture_ns`` is: "receipt" or "sender".
            jpeg: the picture, to be sent along.

        Raises:
            InputError: the source's name cannot stand in a topic.
        """
        source = frame.source
        self._introduce(source)
        self.answer_subscriptions()
        sent = Sent(self._sent[source], time.time_ns())
        self._sent[source] += 1
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
            zones=dict(zones or {}),
            lines={line: dict(crossings) for line, crossings in (lines or {}).items()},
        )
        self._socket.send_multipart(encode(InstancesMessage(source, header, instances, jpeg)))
        return sent

    def event(self, source: str, name: str, /, **data: Any) -> None:
        """Send an event of a source: "state", "size", "ended" or another of docs/wire.md.

        The last "state" or "ended" and the last "size" are sent again to whoever comes later.

        Args:
            source: the source's name.
            name: the event's.
            data: what belongs to it: numbers, strings, lists and maps of them.

        Raises:
            InputError: the source's name cannot stand in a topic.
        """
        self._introduce(source)
        self.answer_subscriptions()
        self._send_event(source, name, data)

    def forget(self, source: str) -> None:
        """Tell nobody any more of a source that was removed; its numbers go on if it comes again.

        Numbers that began anew would be taken for messages that came twice.
        """
        self._kept.pop(source, None)
        self._ended.discard(source)

    def answer_subscriptions(self) -> None:
        """Tell those who subscribed since the last call what they missed.

        ``publish`` and ``event`` do so too; call it now and then while there is nothing to send.
        """
        joined: set[bytes] = set()
        deadline = time.perf_counter() + ANSWER_WITHIN_S
        with suppress(zmq.Again):
            while time.perf_counter() < deadline:
                message = self._socket.recv(zmq.DONTWAIT, copy=False)
                prefix = message.bytes[1:]
                if message.bytes[:1] == b"\x01":
                    self._subscriptions.add(prefix)
                    joined.add(prefix)
                elif message.bytes[:1] == b"\x00" and not _is_from_peer(message):
                    self._subscriptions.drop(prefix)
        if joined:
            self._send_kept(tuple(joined))

    def subscribers(self, source: str) -> int:
        """Count the subscriptions to a source's instances, as of ``answer_subscriptions``."""
        return self._subscriptions.to(topic(source, "instances"))

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
        """Send what is still queued, for 0.2 s at most, and free the endpoint."""
        self._socket.close()
        self._context.term()
        if self._authenticator is not None:
            self._authenticator.join()
        remove_socket_file(self.endpoint)

    def _introduce(self, source: str) -> None:
        """Tell the label names the first time that a source is heard of."""
        if source not in self._kept:
            check_source_name(source)
            self._kept[source] = {}
            data = {"id": self._labels_id, "names": self._label_names}
            self._send_event(source, "labels", data)

    def _send_event(self, source: str, name: str, data: dict[str, Any]) -> None:
        header = EventHeader(
            publisher=self._id,
            seq=self._events[source],
            publish_ns=time.time_ns(),
            event=name,
            sent=self._sent[source],
            data=data,
        )
        self._events[source] += 1
        parts = encode(EventMessage(source, header))
        if slot := _KEPT.get(name):
            self._kept[source][slot] = parts
        if slot == "state":
            (self._ended.add if name == "ended" else self._ended.discard)(source)
        self._socket.send_multipart(parts)

    def _send_kept(self, joined: tuple[bytes, ...]) -> None:
        """Send again what new subscribers must know, once however many came.

        XPUB sends it to the old ones too, who know it by its sequence number. Sources that have
        ended come last, lest a subscriber to all of them should believe, for a moment, that there
        are no others.
        """
        for source in sorted(self._kept, key=self._ended.__contains__):
            if topic(source, "event").startswith(joined):
                for parts in self._kept[source].values():
                    self._socket.send_multipart(parts)


def _is_from_peer(message: zmq.Frame) -> bool:
    """Whether a peer sent it, and not libzmq for one whose connection is gone."""
    try:
        message.get("__fd")
    except zmq.ZMQError:
        return False
    return True
