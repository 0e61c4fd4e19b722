"""Publish stage: sends a message for every frame and event."""

from __future__ import annotations

import io
import time
from collections import Counter
from collections.abc import Sequence
from contextlib import ExitStack
from functools import partial
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
from maskcast.pipeline.stages.masks import Segmented
from maskcast.pipeline.stages.record import Recorded
from maskcast.pipeline.stages.stage import Event, PipelineContext, Stage
from maskcast.pipeline.tracking.analysis import Analysis
from maskcast.pipeline.wire.curve import ClientKeys
from maskcast.pipeline.wire.server_keys import ServerKeys

SUBSCRIBER_POLL_S, BACKLOG_POLL_S = 0.1, 0.001
"""Seconds without a frame after which subscriptions are read, without and with a backlog."""


class PublishedSources(Protocol):
    """The sources whose frames are published."""

    def names(self) -> Sequence[str]:
        """Return the names of all sources."""

    def is_lossless(self, name: str) -> bool:
        """Return whether a source waits for the pipeline instead of losing frames."""

    def ended_events(self) -> Sequence[Event]:
        """Return the ``ended`` event of each source that has ended."""


class Traced(Protocol):
    """The span of a frame that is about to be published."""

    @property
    def traceparent(self) -> str:
        """The span's W3C Trace Context ``traceparent``."""

    def end(self, seq: int, instances: int) -> None:
        """End the span, with the message's sequence number and the number of instances."""


class Tracer(Protocol):
    """Creates spans for some frames."""

    def begin(self, frame: Frame) -> Traced | None:
        """Begin the span of a frame that is about to be published; None if it is not traced."""


class PublishStage(Stage[Segmented, None]):
    """Publishes frames and events, and passes them to the record stage without waiting for it.

    Args:
        inbox: frames and events.
        config: configuration of the publisher; None publishes nothing.
        manifest: the model's manifest.
        sources: the sources whose frames are published.
        recording: the record stage's inbox; None if there are no outputs. If it is full, frames of
            sources that may lose frames replace waiting ones; lossless sources are always added.
        context: as in ``Stage``; ``reading`` is set when enough subscribers are connected.
        tracer: creates spans for frames; None traces nothing.
    """

    idle_timeout_s = SUBSCRIBER_POLL_S

    def __init__(
        self,
        inbox: Inbox[Segmented | Event],
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
        """Create the publisher, and wait for subscribers if configured."""
        if self._config is not None:
            self._publisher = make_publisher(self._config, self._manifest)
            wanted = self._config.wait_subscribers
            while wanted and not self._context.reading.is_set():
                if self._publisher.wait_for_subscribers(
                    wanted, SUBSCRIBER_POLL_S, self._sources.names()
                ):
                    break
        self._context.reading.set()

    def work(self, items: list[Segmented]) -> list[None]:
        """Publish one frame, then pass it to the record stage."""
        (segmented,) = items
        frame, instances = segmented.frame, segmented.instances
        frame.timeline.begin("publish")
        traced = None if self._tracer is None else self._tracer.begin(frame)
        traceparent = "" if traced is None else traced.traceparent
        published = self._publish(frame, instances, segmented.analysis, traceparent)
        frame.timeline.end("publish")
        if traced is not None:
            traced.end(published.seq, len(instances))
        self._context.meter.processed(frame, instances, segmented.analysis)
        if self._recording is not None:
            recorded = Recorded(frame, instances, published)
            if self._sources.is_lossless(frame.source):
                self._recording.post(recorded)
            else:
                self._recording.put(recorded)
        return []

    def event(self, event: Event) -> None:
        """Publish an event; when a source has ended, delete its state."""
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
        """Read subscriptions, and send kept events to new subscribers."""
        if self._publisher is not None:
            self._publisher.answer_subscriptions()
            self._count_subscribers(self._publisher)

    def close(self) -> None:
        """Close the publisher and let the record stage end.

        Before that, publish ``ended`` events that did not arrive because a stage has failed or the
        engine takes too long.
        """
        with ExitStack() as closing:
            if self._publisher is not None:
                closing.callback(self._publisher.close)
                closing.callback(self._publish_missing_ends, self._publisher)
            if self._recording is not None:
                closing.callback(self._recording.close)

    def _publish_missing_ends(self, publisher: Publisher) -> None:
        """Publish ``ended`` for every source for which it has not been published.

        A source without an ``ended`` event is still being read, so this stage has failed.
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
        position = frame.index - frame.skipped  # index among the frames that are not skipped
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
        sent = self._publisher.publish(
            frame,
            instances,
            drops=self._context.meter.drops(source),
            dropped_before=dropped_before,
            zones=analysis.zones,
            lines=analysis.lines,
            jpeg=None if quality is None else partial(encode_jpeg, frame, quality),
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
        # While subscriptions wait to be read, read them between all frames.
        self.idle_timeout_s = BACKLOG_POLL_S if publisher.has_backlog else SUBSCRIBER_POLL_S
        self._context.meter.subscribers = max(
            map(publisher.subscribers, self._sources.names()), default=0
        )
        self._context.meter.subscribers_cut_off = publisher.cut_off


def make_publisher(config: PublishConfig, manifest: Manifest) -> Publisher:
    """Create the publisher of a configuration.

    Raises:
        InputError: a key cannot be read, or an endpoint is invalid or cannot be bound.
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
    """Read the keys for subscribers and those for gateways; None for those not configured.

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
    """Encode a frame's image, upright, as JPEG with ``quality`` 1..100."""
    from PIL import Image  # imported late: most pipelines send no images

    image = Image.fromarray(frame.image())
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()
