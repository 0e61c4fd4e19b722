"""Publish stage: sends a message for every frame and event."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Protocol

from maskcast.engines.bundle import Manifest
from maskcast.engines.instances.instances import Instances
from maskcast.pipeline.configuration.config import PublishConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.inbox import Inbox
from maskcast.pipeline.orders import SourceRemoved
from maskcast.pipeline.outputs.recorder import Published
from maskcast.pipeline.publisher.publisher import Publisher
from maskcast.pipeline.sources.state import MOVED, REMOVED
from maskcast.pipeline.stages.masks import Seen
from maskcast.pipeline.stages.record import Recorded
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.tracking.analysis import Analysis
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.server_keys import ServerKeys

SUBSCRIBER_POLL_S, BACKLOG_POLL_S = 0.1, 0.001
"""Seconds without a frame after which subscriptions are read; the second while a backlog waits."""


class PublishedSources(Protocol):
    """The sources whose frames are published."""

    def names(self) -> Sequence[str]:
        """Return the names of all."""

    def is_lossless(self, name: str) -> bool:
        """Return whether a source waits for the pipeline instead of losing frames."""

    def ended_events(self) -> Sequence[Event]:
        """Return the ``ended`` of each that has ended."""


class Traced(Protocol):
    """A frame that is traced, and is about to be published."""

    @property
    def traceparent(self) -> str:
        """Its span, W3C Trace Context."""

    def end(self, seq: int, instances: int) -> None:
        """End its span: it is published under this number, with its count of instances."""


class Tracer(Protocol):
    """Makes spans of some frames."""

    def begin(self, frame: Frame) -> Traced | None:
        """Begin the span of a frame that is about to be published; None if it is not traced."""


class PublishStage(Stage[Seen, None]):
    """Owns the socket. Hands every frame on to the record stage, and never waits for it.

    Args:
        inbox: frames and events.
        config: the socket's; None for none.
        manifest: the model's.
        sources: tells of all sources.
        recording: the record stage's inbox; None where there are no outputs. Frames of sources
            that may lose some replace one another in it, the others always find space.
        context: as of ``Stage``; ``reading`` is set when enough subscribers are connected.
        tracer: makes spans of frames.
    """

    idle_timeout_s = SUBSCRIBER_POLL_S

    def __init__(
        self,
        inbox: Inbox[Seen | Event],
        config: PublishConfig | None,
        manifest: Manifest,
        sources: PublishedSources,
        recording: Inbox[Recorded | Event] | None,
        context: PipelineContext,
        tracer: Tracer | None = None,
    ) -> None:
        super().__init__("publish", inbox, None, context)
        self._config = config
        self._manifest = manifest
        self._sources = sources
        self._recording = recording
        self._publisher: Publisher | None = None
        self._seq: Counter[str] = Counter()  # used only without a publisher
        self._next_position: Counter[str] = Counter()
        self._ended: set[str] = set()
        self._size: dict[str, tuple[int, int]] = {}
        self._count_at_s = 0.0
        self._tracer = tracer

    def open(self) -> None:
        """Bind the socket, and wait for subscribers if configured."""
        if self._config is not None:
            self._publisher = make_publisher(self._config, self._manifest)
            wanted = self._config.wait_subscribers
            while wanted and not self._context.reading.is_set():
                if self._publisher.wait_for_subscribers(
                    wanted, SUBSCRIBER_POLL_S, self._sources.names()
                ):
                    break
        self._context.reading.set()

    def work(self, items: list[Seen]) -> list[None]:
        """Publish one frame, then hand it on to the record stage."""
        (seen,) = items
        frame, instances = seen.frame, seen.instances
        frame.timeline.begin("publish")
        traced = None if self._tracer is None else self._tracer.begin(frame)
        traceparent = "" if traced is None else traced.traceparent
        published = self._publish(frame, instances, seen.analysis, traceparent)
        frame.timeline.end("publish")
        if traced is not None:
            traced.end(published.seq, len(instances))
        self._context.meter.processed(frame, instances, seen.analysis)
        if self._recording is not None:
            recorded = Recorded(frame, instances, published)
            if self._sources.is_lossless(frame.source):
                self._recording.post(recorded)
            else:
                self._recording.put(recorded)
        return []

    def event(self, event: Event) -> None:
        """Publish an event; behind the last of a source, keep nothing more of it."""
        if self._publisher is not None and event.data.get("reason") != MOVED:
            self._publisher.event(event.source, event.name, **event.data)
        if event.name == "ended":
            if self._recording is not None:
                self._recording.post(event)
            self._ended.intersection_update(self._sources.names())
            self._ended.add(event.source)
            self._next_position.pop(event.source, None)
            self._size.pop(event.source, None)
        else:
            self._ended.discard(event.source)
        if event.data.get("reason") == REMOVED:
            self._seq.pop(event.source, None)
            if self._publisher is not None:
                self._publisher.forget(event.source)
            self._context.send(SourceRemoved(event.source))

    def idle(self) -> None:
        """Send kept events to new subscribers while nothing is published."""
        if self._publisher is not None:
            self._publisher.answer_subscriptions()
            self._count_subscribers(self._publisher)

    def close(self) -> None:
        """Free the endpoint and let the record stage end.

        ``ended`` events that could not pass the stages behind the last frame are published here:
        a stage failed, or the engine takes too long.
        """
        with ExitStack() as closing:
            if self._publisher is not None:
                closing.callback(self._publisher.close)
                closing.callback(self._publish_missing_ends, self._publisher)
            if self._recording is not None:
                closing.callback(self._recording.close)

    def _publish_missing_ends(self, publisher: Publisher) -> None:
        """Publish ``ended`` for every source that has not ended on the wire.

        A source without an ``ended`` event of its own is still being read: this stage failed.
        """
        known = {event.source: event for event in self._sources.ended_events()}
        for name in self._sources.names():
            if name not in self._ended:
                event = known.get(name) or Event(name, "ended", {"reason": "failed"})
                if event.data["reason"] != MOVED:
                    publisher.event(name, event.name, **event.data)

    def _publish(
        self, frame: Frame, instances: Instances, analysis: Analysis, traceparent: str
    ) -> Published:
        source = frame.source
        position = frame.index - frame.skipped  # among the frames that are wanted
        dropped_before = max(position - self._next_position[source], 0)
        if self._publisher is None:
            seq = self._seq[source]
            self._seq[source] += 1
            self._next_position[source] = position + 1
            return Published(seq, time.time_ns(), dropped_before, analysis)
        size = (instances.width, instances.height)
        if self._size.get(source) != size:
            self._size[source] = size
            self._publisher.event(source, "size", width=size[0], height=size[1])
        quality = self._config.jpeg_quality if self._config is not None else None
        jpeg = None
        if quality is not None and self._publisher.subscribers(source):
            jpeg = encode_jpeg(frame, quality)
        sent = self._publisher.publish(
            frame,
            instances,
            drops=self._context.meter.drops(source),
            dropped_before=dropped_before,
            zones=analysis.zones,
            lines=analysis.lines,
            jpeg=jpeg,
            clock=frame.clock,
            traceparent=traceparent,
        )
        self._next_position[source] = position + 1
        for name, data in analysis.events:
            self._publisher.event(source, name, **data)
        if self._publisher.has_backlog or time.monotonic() >= self._count_at_s:
            self._count_subscribers(self._publisher)
        return Published(sent.seq, sent.publish_ns, dropped_before, analysis)

    def _count_subscribers(self, publisher: Publisher) -> None:
        self._count_at_s = time.monotonic() + SUBSCRIBER_POLL_S
        # While subscriptions wait to be read, every free moment goes to them.
        self.idle_timeout_s = BACKLOG_POLL_S if publisher.has_backlog else SUBSCRIBER_POLL_S
        self._context.meter.subscribers = max(
            map(publisher.subscribers, self._sources.names()), default=0
        )
        self._context.meter.subscribers_cut_off = publisher.cut_off


def make_publisher(config: PublishConfig, manifest: Manifest) -> Publisher:
    """Make the publisher of a configuration.

    Raises:
        InputError: a key cannot be read, or an endpoint cannot be used.
    """
    keys, gateway_keys = read_keys(config)
    return Publisher(
        config.endpoint,
        manifest.labels,
        masks=config.masks,
        high_water_mark=config.high_water_mark,
        keys=keys,
        gateways=config.gateways,
        gateway_keys=gateway_keys,
        keypoints=manifest.keypoints,
    )


def read_keys(config: PublishConfig) -> tuple[ServerKeys | None, ClientKeys | None]:
    """Read the keys for subscribers, or those for the gateways; None where there are none.

    Raises:
        InputError: a key cannot be read.
    """
    curve = config.curve
    if curve is not None and config.gateways and curve.gateway_key is not None:
        return None, ClientKeys.read(curve.gateway_key, curve.secret_key)
    if curve is not None and not config.gateways and curve.allowed_clients is not None:
        return ServerKeys.read(curve.secret_key, curve.allowed_clients), None
    return None, None


def encode_jpeg(frame: Frame, quality: int) -> bytes:
    """Encode a frame's image, upright, as JPEG of ``quality`` 1..100."""
    from PIL import Image  # only here: most pipelines send no images

    image = Image.fromarray(frame.image())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
