"""FrameTracer: sends OpenTelemetry spans of sampled frames, from their timelines, over OTLP.

A frame is a span from the start of decoding to the end of publication, and each stage's work is a
span in it. The frame's span is announced in the message as ``traceparent`` (W3C Trace Context), so
that a subscriber can continue the trace.
"""

from __future__ import annotations

import os
import random
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from maskcast.pipeline.configuration.config import TracingConfig
from maskcast.pipeline.frame import Frame
from maskcast.pipeline.packages import check_installed

if TYPE_CHECKING:
    from opentelemetry.trace import Tracer

EXPORT_TIMEOUT_S = 1.0
"""Timeout of an export, seconds. A slower collector loses spans; it delays the end of a run by no
more than this."""

_PACKAGES = ("opentelemetry.sdk", "opentelemetry.exporter.otlp.proto.http")


def check_tracing_packages() -> None:
    """Check that the packages of the tracing extra are installed.

    Raises:
        InputError: one is missing.
    """
    check_installed(_PACKAGES, "tracing", "tracing")


class FrameTracer:
    """Creates spans of some frames and exports them in the background.

    Not thread-safe: it belongs to the publish stage. The service is named "maskcast", unless the
    environment variable ``OTEL_SERVICE_NAME`` is set.

    Args:
        config: the collector, and the share of the frames to trace.
        draw: returns random numbers in 0..1; a frame is traced if its number is below the ratio.
    """

    def __init__(self, config: TracingConfig, draw: Callable[[], float] = random.random) -> None:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor

        service = os.environ.get("OTEL_SERVICE_NAME", "maskcast")
        self._provider = TracerProvider(
            resource=Resource.create({SERVICE_NAME: service}), shutdown_on_exit=False
        )
        exporter = OTLPSpanExporter(
            endpoint=f"{config.endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S
        )
        self._provider.add_span_processor(BatchSpanProcessor(exporter))
        self._tracer = self._provider.get_tracer("maskcast")
        self._ratio = config.ratio
        self._draw = draw

    def begin(self, frame: Frame) -> TracedFrame | None:
        """Begin the span of a frame that is about to be published; None if it is not sampled."""
        if self._draw() >= self._ratio:
            return None
        return TracedFrame(self._tracer, frame)

    def close(self) -> None:
        """Export the remaining spans, for at most ``EXPORT_TIMEOUT_S``."""
        self._provider.force_flush(int(1000 * EXPORT_TIMEOUT_S))
        self._provider.shutdown()


class TracedFrame:
    """A sampled frame that is about to be published; its span is not ended yet.

    Attributes:
        traceparent: the span's W3C Trace Context.
    """

    def __init__(self, tracer: Tracer, frame: Frame) -> None:
        self._tracer, self._frame = tracer, frame
        self._span = tracer.start_span(
            "frame",
            attributes={"maskcast.source": frame.source, "maskcast.index": frame.index},
            start_time=frame.timeline.start_ns["decode"] + _to_utc_ns(),
        )
        context = self._span.get_span_context()
        self.traceparent = f"00-{context.trace_id:032x}-{context.span_id:016x}-01"

    def end(self, seq: int, instances: int) -> None:
        """End the frame's span, and create those of its stages from the complete timeline.

        Args:
            seq: the number of its message.
            instances: number of instances in it.
        """
        from opentelemetry.trace import set_span_in_context

        offset_ns, inside = _to_utc_ns(), set_span_in_context(self._span)
        timeline = self._frame.timeline
        for stage, end_ns in timeline.end_ns.items():
            start_ns = timeline.start_ns[stage]
            span = self._tracer.start_span(stage, inside, start_time=start_ns + offset_ns)
            span.end(end_ns + offset_ns)
        self._span.set_attributes({"maskcast.seq": seq, "maskcast.instances": instances})
        self._span.end(timeline.end_ns["publish"] + offset_ns)


def _to_utc_ns() -> int:
    """Return the offset from ``time.monotonic_ns`` to UTC, nanoseconds."""
    return time.time_ns() - time.monotonic_ns()
